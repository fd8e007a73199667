"""Reports of one inference server: its status and its commits, merged from the answers of its ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hubsync.apply.protocol import STATES, error_from_json
from hubsync.errors import HubsyncError
from hubsync.format.manifest import Position

_PHASES = ("fetch", "decode", "place", "stage", "commit", "verify")


@dataclass(frozen=True)
class PauseWindow:
    """A commit window that a client opened, with the server paused.

    Attributes:
        position: the position to commit.
        token: closes the window.
        abandoned: whether it has been open for so long that its client must be gone.
    """

    position: Position
    token: str
    abandoned: bool = False


@dataclass(frozen=True)
class Verified:
    """What a server says of its live weights, merged from all of its ranks.

    Attributes:
        verified: whether no write is unverified. False also before the position is known.
        age_s: seconds since all weights were last looked at and found right, on the rank where that is longest ago;
            None if a rank has not yet done it.
        share: of the time in which idle workers look at them again, on the rank where it is smallest.
        healed: why weights were rebuilt last, on the first rank that has; None if none has.
    """

    verified: bool
    age_s: float | None
    share: float
    healed: str | None


@dataclass(frozen=True)
class ReplicaStatus:
    """The status of one server, merged from all of its ranks.

    Attributes:
        state: state of the rank that is furthest from ready.
        position: where the live weights are; None while unknown, or when the ranks differ.
        staged: the position that all ranks have staged; None if there is none.
        window: a commit window left open, or None.
        error: the first rank's recorded error, or None.
        run_id: the run that the server follows, or None.
        atomic: whether it can commit without a pause. False where data parallel engines share forward passes.
        spans_engines: whether a forward pass of one engine waits for another engine.
        verification: of the live weights; None from a server that does not state it.
        adapter: model name that requests use for the LoRA adapter that the server follows; None for a whole model.
        adapter_path: the adapter's directory on the server's host.
        ranks: the untouched answers, in rank order.
    """

    state: str
    position: Position | None
    staged: Position | None
    window: PauseWindow | None
    error: HubsyncError | None
    run_id: str | None
    atomic: bool
    spans_engines: bool
    verification: Verified | None
    adapter: str | None
    adapter_path: str | None
    ranks: tuple[dict[str, Any], ...]

    @property
    def seconds(self) -> dict[str, float]:
        """Of the last phases, on the slowest rank."""
        metrics = [rank.get("metrics") or {} for rank in self.ranks]
        found = {phase: [float(each[f"{phase}_s"]) for each in metrics if f"{phase}_s" in each] for phase in _PHASES}
        return {phase: max(values) for phase, values in found.items() if values}

    @property
    def staged_bytes(self) -> int:
        """Of the last staging, of all ranks."""
        return sum(int((rank.get("metrics") or {}).get("stage_bytes", 0)) for rank in self.ranks)

    def all_at(self, position: Position) -> bool:
        """Whether all ranks serve this position."""
        return all(position_of(rank) == position for rank in self.ranks)

    def all_ready_for(self, position: Position) -> bool:
        """Whether every rank serves this position, or has staged it."""
        return all(position in (position_of(rank), position_of(rank.get("staged") or {})) for rank in self.ranks)


@dataclass(frozen=True)
class CommitReport:
    """One commit.

    Attributes:
        position: what the server serves now.
        pause_s: seconds in which no request made progress: of the turn in which the slowest engine committed, or from
            pause to resume if the server was paused.
        commit_s: seconds of writing, on the slowest rank.
        stage_s: seconds of staging (fetch, verify, decode, map), on the slowest rank.
        changed: elements written, over all ranks' shards; None if the workers do not report it.
    """

    position: Position
    pause_s: float
    commit_s: float
    stage_s: float
    changed: int | None

    @property
    def version(self) -> int:
        return self.position.version


def merged_status(url: str, ranks: list[dict[str, Any]]) -> ReplicaStatus:
    positions = {position_of(rank) for rank in ranks}
    staged = {position_of(rank.get("staged") or {}) for rank in ranks}
    windows = [_window(rank) for rank in ranks if rank.get("window")]
    failures = [rank["error"] for rank in ranks if rank.get("error")]
    adapter = ranks[0].get("adapter")
    return ReplicaStatus(
        state=min((str(rank.get("state")) for rank in ranks), key=_badness),
        position=positions.pop() if len(positions) == 1 else None,
        staged=staged.pop() if len(staged) == 1 else None,
        window=windows[0] if windows else None,
        error=error_from_json(failures[0], f"{url}: ") if failures else None,
        run_id=ranks[0].get("run_id"),
        atomic=all(rank["engine"]["atomic"] for rank in ranks),
        verification=_verified([rank.get("verification") for rank in ranks]),
        spans_engines=any(int(rank.get("parallel", {}).get("dp", 1)) > 1 for rank in ranks),
        adapter=None if adapter is None else str(adapter["name"]),
        adapter_path=None if adapter is None else str(adapter["path"]),
        ranks=tuple(ranks),
    )


def commit_report(position: Position, applied: list[dict[str, Any]], pause_s: float) -> CommitReport:
    changed = [int(rank["changed"]) for rank in applied if "changed" in rank]
    return CommitReport(
        position=position,
        pause_s=pause_s,
        commit_s=_slowest(applied, "commit_s"),
        stage_s=_slowest(applied, "stage_s"),
        changed=sum(changed) if len(changed) == len(applied) else None,
    )


def longest_turn(applied: list[dict[str, Any]]) -> float:
    return max(float(rank["engine"]["turn_s"]) for rank in applied)


def heals(rank: dict[str, Any]) -> int:
    """How often a rank has rebuilt its weights."""
    return int((rank.get("metrics") or {}).get("heals", 0))


def _verified(ranks: list[dict[str, Any] | None]) -> Verified | None:
    known = [rank for rank in ranks if rank is not None]
    if len(known) < len(ranks):
        return None
    ages = [rank["age_s"] for rank in known]
    return Verified(
        verified=all(bool(rank["verified"]) for rank in known),
        age_s=None if None in ages else max(map(float, ages)),
        share=min(float(rank["share"]) for rank in known),
        healed=next((str(rank["healed"]) for rank in known if rank["healed"]), None),
    )


def _window(rank: dict[str, Any]) -> PauseWindow:
    window, timeout = rank["window"], float(rank["engine"]["window_timeout_s"])
    position = Position(int(window["version"]), str(window["digest"]))
    return PauseWindow(position, str(window["token"]), abandoned=float(window["age_s"]) > timeout)


def _badness(state: str) -> int:
    """Order of states, worst first: of several ranks, the worst gives the server's state."""
    return STATES.index(state) if state in STATES else 0


def position_of(document: dict[str, Any]) -> Position | None:
    version, digest = document.get("version"), document.get("digest")
    return None if version is None or digest is None else Position(int(version), str(digest))


def _slowest(ranks: list[dict[str, Any]], metric: str) -> float:
    return max(float((rank.get("metrics") or rank).get(metric) or 0.0) for rank in ranks)
