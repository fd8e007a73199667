"""Each extra of pyproject.toml resolves with the newest releases. Needs a package index; nothing is installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]

HEADER = re.compile(r"^# /// script\n((?:#.*\n)+?)# ///$", re.MULTILINE)

pytestmark = pytest.mark.long


def extras() -> list[str]:
    """All extras, and those of a machine that trains and serves."""
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2].partition("\n\n")[0]
    return [*re.findall(r"^([\w-]+) = ", table, re.MULTILINE), "trl,vllm"]


@cache
def newest(package: str) -> str | None:
    """The newest release that the index has; None if there is no index here."""
    done = subprocess.run([*PIP, "index", "versions", package], capture_output=True, text=True)
    found = re.match(rf"{package} \((\S+)\)", done.stdout)
    return found[1] if done.returncode == 0 and found else None


def resolved(directory: Path, *requirements: str) -> dict[str, str]:
    """The versions that pip would install."""
    if newest("pip") is None:
        pytest.skip("no package index can be reached")
    report = directory / "report.json"
    options = ["--dry-run", "--ignore-installed", "--quiet", "--report", str(report)]
    done = subprocess.run([*PIP, "install", *options, *requirements], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report.read_text())["install"]}


@pytest.mark.parametrize("extra", extras())
def test_an_extra_resolves_with_the_newest_releases(extra: str, tmp_path: Path) -> None:
    chosen = resolved(tmp_path, f".[{extra}]")
    wanted = [name for name in extra.split(",") if name in ("trl", "vllm")]
    assert {name: chosen[name] for name in wanted} == {name: newest(name) for name in wanted}


def headers(with_vllm: bool) -> set[str]:
    """What the headers (PEP 723) of the examples name that need vLLM beside the trainer, or of the others."""
    named: set[str] = set()
    for script in (ROOT / "examples").glob("*/*.py"):
        for header in HEADER.findall(script.read_text()):
            names = set(re.findall(r'^#     "(.*)",$', header, re.MULTILINE))
            named |= names if any(name.startswith("vllm") for name in names) == with_vllm else set()
    return named


@pytest.mark.parametrize("with_vllm", [False, True], ids=["trainer", "trainer with vLLM"])
def test_the_dependencies_of_the_examples_resolve(with_vllm: bool, tmp_path: Path) -> None:
    named = headers(with_vllm)
    assert len(named) > 5
    resolved(tmp_path, *sorted(name.replace("hubsync-rl", ".") for name in named))
