"""Compiled code is kept where the machine allows it, and no disk keeps a function from running."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numba
import pytest

from hubsync.kernels import compiled

SOURCE = """
from hubsync.kernels.compiled import compiled

@compiled
def double(value):
    return 2 * value
"""


@pytest.fixture(autouse=True)
def _messages_anew() -> None:
    compiled._fallback.cache_clear()
    compiled._report.cache_clear()


@pytest.fixture
def imported(tmp_path: Path) -> Callable[[], Callable[[int], int]]:
    """Imports a module with a compiled function, as a new process would."""
    (tmp_path / "package").mkdir()
    source = tmp_path / "package" / "toy_module.py"
    source.write_text(SOURCE)

    def load() -> Callable[[int], int]:
        spec = spec_from_file_location("toy_module", source)
        assert spec is not None
        assert spec.loader is not None
        module: Any = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.double

    return load


@pytest.fixture
def _read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, imported: object) -> None:
    """Nobody, not even root, can write beside the module or into the home."""
    (tmp_path / "package" / "__pycache__").write_text("a file")
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_the_next_process_finds_the_code_beside_its_source(tmp_path: Path, imported: Callable) -> None:
    assert imported()(4) == 8
    again = imported()
    assert again(4) == 8
    assert sum(again.stats.cache_hits.values()) == 1


@pytest.mark.usefixtures("_read_only")
def test_a_read_only_installation_without_a_home_keeps_the_code_in_a_private_directory(
    tmp_path: Path, imported: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    assert imported()(4) == 8
    again = imported()
    assert again(4) == 8
    assert sum(again.stats.cache_hits.values()) == 1
    assert list((tmp_path / f"hubsync-{os.getuid()}").rglob("*.nbc"))
    assert [message for message in caplog.messages if "NUMBA_CACHE_DIR" in message] == caplog.messages
    assert len(caplog.messages) == 1


@pytest.mark.usefixtures("_read_only")
def test_where_nothing_can_be_written_code_is_compiled_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, imported: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    assert imported()(4) == 8
    assert imported()(4) == 8
    assert len(caplog.messages) == 1


def test_a_disk_that_is_full_at_the_first_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, imported: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    double = imported()
    cache = tmp_path / "package" / "__pycache__"
    for path in sorted(cache.rglob("*"), reverse=True):
        path.unlink()
    cache.rmdir()
    cache.write_text("nothing can be written below a file, as on a full disk")
    assert double(4) == 8
    assert double(4.0) == 8.0
    (message,) = caplog.messages
    assert "compiled code cannot be kept" in message


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_file_that_a_power_cut_left_empty_is_compiled_again(tmp_path: Path, imported: Callable, suffix: str) -> None:
    imported()(4)
    (kept,) = (tmp_path / "package").rglob(f"*.{suffix}")
    kept.write_bytes(b"")
    assert imported()(4) == 8
