"""mkdocs hooks: take README, CHANGELOG and the like from the repository root, and mend links for the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

# File of the repository -> page of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
}
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at pages of the site. Links to other files of the repository become their paths."""
    sources = {name: source for source, name in PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return _LINK.sub(lambda match: _link(match, posixpath.dirname(source), page.file.src_uri), markdown)


def _link(match: re.Match[str], directory: str, page: str) -> str:
    text, target, anchor = match[1], match[2], match[3] or ""
    if "://" in target:
        return match[0]
    path = posixpath.normpath(posixpath.join(directory, target))
    if path in PAGES:
        path = PAGES[path]
    elif path.startswith("docs/") and path.endswith(".md"):
        path = path.removeprefix("docs/")
    else:
        return text if text.strip("`") == path else f"{text} (`{path}`)"
    return f"[{text}]({posixpath.relpath(path, posixpath.dirname(page) or '.')}{anchor})"
