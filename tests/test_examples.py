"""Every example starts. `tests/servers/test_examples.py` runs each on a tiny model (`make test-long`)."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*/*.py") if "__main__" in path.read_text())


def test_all_examples_are_covered() -> None:
    modules = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.glob("*/*.py")} - {
        path.relative_to(EXAMPLES).as_posix() for path in SCRIPTS
    }
    assert modules == {"weight_syncer/training.py"}, "imported by the scripts beside it"
    assert {path.parent.name for path in SCRIPTS} == {path.name for path in EXAMPLES.iterdir() if path.is_dir()}


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
