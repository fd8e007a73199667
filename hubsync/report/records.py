"""What a trainer and followers have written down: the trainer's log, and the events of `hubsync follow --json`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from hubsync.errors import ConfigError

_MAX_BYTES = 256 << 20
_TEXT = 300
SYNC = "weight_sync/"


@dataclass(frozen=True)
class TrainerLog:
    """Rows of a trainer's log, each with its `step`. Only finite numbers are kept."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def series(self, metric: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric."""
        found = [(row["step"], row[metric]) for row in self.rows if metric in row]
        return [step for step, _ in found], [value for _, value in found]

    @property
    def metrics(self) -> list[str]:
        """Names, in the order of their first row."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name != "step"))


@dataclass(frozen=True)
class Event:
    """One line of `hubsync follow --json`, or a commit that a trainer's log tells.

    Attributes:
        kind: "commit", "verified" or "error".
        server: URL, or a name.
        time: seconds since 1970; None from a follower that does not state it.
        version: that is served from then on; None for an error.
        seconds: of phases, by name.
        message: of an error.
    """

    kind: str
    server: str
    time: float | None
    version: int | None
    seconds: Mapping[str, float]
    message: str = ""


def read_log(path: Path) -> TrainerLog:
    """`trainer_state.json`, a JSON list of rows, JSON lines of rows, or what `hubsync demo --json` wrote.

    ConfigError if it is none of these.
    """
    rows = [row for document in _documents(path) for row in _rows_of(document)]
    kept, step = [], 0.0
    for row in rows:
        numbers = {str(name)[:_TEXT]: float(value) for name, value in row.items() if _is_number(value)}
        step = numbers.setdefault("step", step)
        if len(numbers) > 1:
            kept.append(numbers)
    if not kept:
        raise ConfigError(
            f"{path} holds no rows of a log: give the trainer_state.json of a checkpoint, or JSON lines, one row of "
            "`trainer.state.log_history` each"
        )
    return TrainerLog(kept)


def read_events(path: Path) -> list[Event]:
    """The output of `hubsync follow --json`. ConfigError if no line of it is an event."""
    events = [event for document in _documents(path) if (event := _event(document, path.stem)) is not None]
    if not events:
        raise ConfigError(f"{path} holds no events: give the output of `hubsync follow ADDRESS --server URL --json`")
    return events


def _event(document: Any, name: str) -> Event | None:
    if not isinstance(document, dict) or document.get("event") not in ("commit", "verified", "error"):
        return None
    time, version = document.get("time"), document.get("version")
    phases = ("stage", "commit", "pause", "verify")
    seconds = {phase: document.get(f"{phase}_s") for phase in phases}
    if document["event"] != "error" and type(version) is not int:
        return None
    return Event(
        kind=document["event"],
        server=str(document.get("server") or name)[:_TEXT],
        time=float(time) if _is_number(time) else None,
        version=version if type(version) is int else None,
        seconds={phase: float(value) for phase, value in seconds.items() if _is_number(value) and value >= 0},
        message=f"{document.get('error')}: {document.get('message')}"[:_TEXT] if document["event"] == "error" else "",
    )


def _rows_of(document: Any) -> list[dict[str, Any]]:
    if isinstance(document, dict):
        for name in ("log_history", "steps"):  # of trainer_state.json, of the demo
            if isinstance(document.get(name), list):
                document = document[name]
                break
    rows = document if isinstance(document, list) else [document]
    return [row for row in rows if isinstance(row, dict)]


def _documents(path: Path) -> Iterator[Any]:
    """The JSON documents of a file: one, or one a line. Lines that are none are left out."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_BYTES} bytes, the limit of the report")
        text = path.read_text(errors="replace")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    try:
        yield json.loads(text)
        return
    except (ValueError, RecursionError):
        pass
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            continue


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
