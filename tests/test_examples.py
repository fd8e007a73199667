"""Every example starts. `tests/servers/test_examples.py` runs each on a tiny model (`make test-long`)."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

pytest.importorskip("trl")

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = EXAMPLES / "accelerate_configs"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*/*.py") if "__main__" in path.read_text())


def test_all_examples_are_covered() -> None:
    modules = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.glob("*/*.py")} - {
        path.relative_to(EXAMPLES).as_posix() for path in SCRIPTS
    }
    layout = "megatron/layout.py"  # run by tests/publish/test_cuts.py
    assert modules == {"weight_syncer/training.py", layout}, "imported by the scripts beside it"
    assert {path.parent.name for path in SCRIPTS} | {CONFIGS.name, Path(layout).parent.name} == {
        path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    listed = (EXAMPLES / "README.md").read_text()
    assert [path for path in SCRIPTS if f"| [{path.parent.name}](" not in listed] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_example_prints_its_options(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Imports, and the parser of all arguments together, whose names must not clash."""
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(script.parent)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert "--help" in capsys.readouterr().out


# Modules that come with others: with hubsync (torch, ...), or with its extra `trl`.
_COMES_WITH = {
    "hubsync-rl": {"httpx", "hubsync", "torch"},
    "hubsync-rl[trl]": {"datasets", "httpx", "hubsync", "torch", "transformers", "trl"},
}
_HEADER = re.compile(r"^# /// script\n((?:#.*\n)+?)# ///$", re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_example_names_its_dependencies(script: Path) -> None:
    """By PEP 723, as `uv run` and `pipx run` read them; hubsync is that of this clone."""
    (found,) = _HEADER.findall(script.read_text())
    lines = [line.removeprefix("#").strip() for line in found.splitlines()]
    text = "\n".join(lines)
    names = ast.literal_eval(text.partition("dependencies = ")[2].partition("\n\n")[0])
    assert (script.parent / re.search(r'hubsync-rl = \{ path = "(.*)" \}', text)[1] / "pyproject.toml").exists()  # type: ignore[index]
    provided = set().union(*(_COMES_WITH.get(name, {Requirement(name).name}) for name in names))
    tree = ast.parse(script.read_text())
    used = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    used |= {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert used - set(sys.stdlib_module_names) - {"training"} <= provided


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_of_accelerate_are_accepted(file: Path) -> None:
    """`tests/servers/test_accelerate.py` trains with each."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes == 8
    assert yaml.safe_load(file.read_text())["mixed_precision"] == "bf16"
