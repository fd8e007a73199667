"""Progress is shown on a terminal only, and never in what other programs read."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest

from hubsync import progress as shown_progress
from hubsync.bucket import Download, LocalBucket, Upload
from hubsync.bucket.hub import HubBucket
from hubsync.cli.main import main
from hubsync.progress import note, progress, say
from tests.support.history import History


class Terminal(io.StringIO):
    """A stand-in for stderr on a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    monkeypatch.setattr(shown_progress, "_stderr", lambda: terminal)
    monkeypatch.setattr(shown_progress, "SHOWN_AFTER_S", 0.0)
    monkeypatch.setattr(shown_progress, "LEAST_BYTES", 1)
    monkeypatch.setattr(shown_progress, "_is_off", False)
    monkeypatch.setattr(shown_progress, "_said", set())
    return terminal


@pytest.fixture
def history(tmp_path: Path) -> History:
    history = History(LocalBucket(tmp_path / "run", create=True))
    history.publish(), history.publish()
    return history


def test_a_bar_states_what_it_counts_and_is_gone_at_the_end(terminal: Terminal) -> None:
    with progress("moving", 2_000_000) as shown:
        shown.add(500_000)
        shown.at(2_000_000)
    text = terminal.getvalue()
    assert "moving" in text
    assert "2.00M" in text
    assert text.endswith("\r")


def test_without_a_terminal_nothing_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shown_progress, "LEAST_BYTES", 1)
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(shown_progress, "_stderr", lambda stream=stream: stream)
        with progress("moving", 100) as shown:
            shown.add(100)
        note("begins")
        say("a line")
        assert stream is None or stream.getvalue() == ""
    assert capsys.readouterr().out == "a line\n" * 2


def test_a_note_may_be_said_once(terminal: Terminal) -> None:
    for _ in range(2):
        note("compiling", once=True)
        note("phase")
    assert terminal.getvalue().count("compiling") == 1
    assert terminal.getvalue().count("phase") == 2


def test_small_transfers_show_nothing(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown_progress, "LEAST_BYTES", 101)
    with progress("moving", 100) as shown:
        shown.add(100)
    assert terminal.getvalue() == ""


def test_uploads_and_downloads_of_a_hub_and_a_directory_have_bars(
    terminal: Terminal, hub_bucket: HubBucket, tmp_path: Path
) -> None:
    data = bytes(1000)
    wanted = Download("part", len(data), hashlib.sha256(data).hexdigest(), tmp_path / "cache" / "part")
    for bucket, written, read in (
        (hub_bucket, "write part", "read run/part"),
        (LocalBucket(tmp_path / "bucket", create=True), "writing to", "reading from"),
    ):
        bucket.put([Upload("part", data)])
        bucket.fetch([wanted])
        wanted.destination.unlink()
        assert written in terminal.getvalue()
        assert read in terminal.getvalue()


def test_commands_show_bars_on_stderr_and_keep_their_output(
    history: History, terminal: Terminal, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    address = history.bucket.address
    assert main(["compact", address]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "merged deltas written: 1"
    assert "merging" in terminal.getvalue()
    main(["verify", address])
    assert "replaying" in terminal.getvalue()
    assert "files intact" in capsys.readouterr().out


def test_json_is_not_accompanied_by_bars(
    history: History, terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["verify", history.bucket.address, "--json"])
    json.loads(capsys.readouterr().out)
    assert terminal.getvalue() == ""
