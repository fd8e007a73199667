"""Pages and READMEs: their links lead somewhere, and what they tell a user to type is accepted."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from hubsync.cli import commands
from hubsync.cli.main import make_parser
from hubsync.publish.config import SyncConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    {
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("deploy/**/*.md"),
        ROOT / "benchmarks/README.md",
    }
)
FENCE = re.compile(r"^( *)```([a-z]*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def fenced(page: Path, *languages: str) -> Iterator[str]:
    """Blocks of code. Lines that end with a backslash are joined with the next."""
    for _, language, text in FENCE.findall(page.read_text()):
        if language in languages:
            yield re.sub(r" *\\\n *", " ", text)


@cache
def anchors(page: Path) -> set[str]:
    """Anchors of headings, as mkdocs and GitHub make them."""
    lines = FENCE.sub("", page.read_text()).splitlines()
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line.lstrip("# ")) for line in lines if line.startswith("#")]
    return {re.sub(r"[ \t]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pages
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        there = (page.parent / path).resolve() if path else page
        generated = "docs/api" in str(there)  # their anchors are names of objects: `make docs` checks them
        if not there.exists() or (anchor and not generated and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    listed = set(re.findall(r"[\w/.-]+\.md", navigation))
    assert {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")} <= listed


def command_lines(page: Path, program: str) -> Iterator[list[str]]:
    """Arguments of each call of a program in the blocks of a page."""
    for block in fenced(page, "", "bash", "sh", "console"):
        for line in block.splitlines():
            words = line.removeprefix("$ ").strip()
            if re.match(rf"(?:[A-Z_]+=\S* )*{program} ", words):
                arguments = re.split(r"\s[|&>]", words)[0]
                yield shlex.split(re.sub(r"^(?:[A-Z_]+=\S* )*", "", arguments), comments=True)[1:]


@pages
def test_commands_are_accepted(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_parser(commands.built_in())
    refused = []
    for words in command_lines(page, "hubsync"):
        try:
            parser.parse_args(words)
        except SystemExit as ended:
            refused += [(words, capsys.readouterr().err)] if ended.code else []
    assert refused == []


@pages
def test_make_targets_and_benchmarks_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for words in command_lines(page, "make") for word in words if re.fullmatch(r"[a-z-]+", word)}
    assert named <= targets
    modules = {words[1] for words in command_lines(page, "python") if words[0] == "-m"}
    files = {name: ROOT / name.replace(".", "/") for name in modules if name.startswith("benchmarks.")}
    assert [name for name, path in files.items() if not (path.with_suffix(".py").exists() or path.is_dir())] == []


@pages
def test_python_is_valid_and_names_what_exists(page: Path) -> None:
    settings = {field.name for field in fields(SyncConfig)}
    for block in fenced(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "SyncConfig":
                assert {keyword.arg for keyword in node.keywords if keyword.arg} <= settings
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hubsync":
                assert {alias.name for alias in node.names} <= defined(node.module or "")


@cache
def defined(module: str) -> set[str]:
    """Names at the top level of a module, found without importing it."""
    path = ROOT / module.replace(".", "/")
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    return set(re.findall(r"\w+", source))
