"""Where files are kept on a machine without a home, or with nothing that can be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from hubsync import cache


@pytest.fixture(autouse=True)
def _no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a read-only container: a home that nobody can write, not even root, and a TMPDIR."""
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HUBSYNC_CACHE", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache._instead_of.cache_clear()


def private(tmp_path: Path) -> Path:
    return tmp_path / f"hubsync-{os.getuid()}"


def test_the_environment_takes_precedence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HUBSYNC_CACHE", "/anywhere")
    assert cache.default_cache() == Path("/anywhere")


def test_the_users_cache_is_used_where_it_can_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.default_cache() == tmp_path / "home" / ".cache" / "hubsync"
    assert not (tmp_path / "home").exists(), "asking for the directory makes nothing"


def test_without_a_home_files_are_kept_in_a_private_directory_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert cache.default_cache() == cache.default_cache() == private(tmp_path)
    assert private(tmp_path).stat().st_mode & 0o777 == 0o700
    (message,) = caplog.messages
    assert "Set HUBSYNC_CACHE" in message


def test_a_user_without_an_entry_has_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    assert cache.default_cache() == private(tmp_path)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_directory_that_others_can_write_to_is_not_used(tmp_path: Path, mode: int) -> None:
    private(tmp_path).mkdir()
    private(tmp_path).chmod(mode)
    assert cache.private_directory() is None


def test_a_link_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    private(tmp_path).symlink_to(tmp_path / "elsewhere")
    assert cache.private_directory() is None


def test_where_nothing_can_be_written_the_usual_name_is_left_for_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    assert cache.private_directory() is None
    assert cache.default_cache() == Path("/dev/null/.cache/hubsync")
