"""Agreement of the ranks of one engine, as pure functions of each rank's report.

Every rank holds a part of the published view: rows, columns, layers, experts; some elements are on several ranks.
`join` decides once which rank *owns* each element (the first that holds it), checks that copies are equal and that
nothing is missing, and adds the owners' digests up to the digest of the whole view. `decide` is called before every
write, and says whether all ranks may write. All ranks evaluate the same reports in the same order, so all come to the
same conclusion, and no rank acts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hubsync.errors import ReplicaRefused, WrongParent
from hubsync.format.digest import Digest
from hubsync.format.manifest import Position
from hubsync.format.table import TensorTable

from .protocol import error_from_json, error_to_json
from .regions import Region, overlap

RELOAD = "hubsync cannot follow this model in place: restart the server from what `hubsync pull` writes instead"
"""The way out where no setting helps."""


class WorkerGroup(Protocol):
    """The workers of one engine. `gather` is a collective: all of them must call it, in the same order."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        ...


class SingleWorker:
    """An engine of one worker."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


# --- inventory --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holding:
    """Elements of one tensor that a rank holds in one region.

    Attributes:
        index: of the tensor in the run's table.
        region: the elements; equal regions of several ranks are copies.
        digest: of these elements, as they are in live memory.
    """

    index: int
    region: Region
    digest: Digest


Inventory = Sequence[Holding]
"""Everything that one rank holds, in the order of its coordinate map."""


def join(table: TensorTable, inventories: Sequence[Inventory]) -> tuple[list[list[bool]], Digest]:
    """Decide which rank owns each element, and compute the digest of the whole view in live memory.

    Returns:
        (for each rank and each of its holdings: does it own that?; the digest).

    Raises:
        ReplicaRefused: elements that no rank holds, copies that differ, or regions that overlap without being equal.
    """
    owned: list[list[bool]] = []
    owners: dict[tuple, tuple[int, Holding]] = {}
    total = Digest()
    for rank, inventory in enumerate(inventories):
        owned.append([])
        for holding in inventory:
            key = holding.index, holding.region.source_key
            owner = owners.setdefault(key, (rank, holding))
            owned[-1].append(owner[1] is holding)
            if owned[-1][-1]:
                total += holding.digest
            elif owner[1].digest != holding.digest:
                where = f"ranks {owner[0]} and {rank} hold" if owner[0] != rank else f"rank {rank} holds two"
                raise ReplicaRefused(f"{table[holding.index].name}: {where} copies of it that differ")
    by_tensor: list[list[Region]] = [[] for _ in table]
    for _, holding in owners.values():
        by_tensor[holding.index].append(holding.region)
    for spec, regions in zip(table, by_tensor, strict=True):
        _check_whole(spec.name, spec.numel, regions)
    return owned, total


def _check_whole(name: str, numel: int, regions: Sequence[Region]) -> None:
    """ReplicaRefused unless the regions hold each of a tensor's elements exactly once."""
    held = sum(region.numel for region in regions)
    if held == 0 and numel:
        raise ReplicaRefused(
            f"{name}: the model's load_weights ignores it; it is tied to another tensor, or not part of the served "
            "model. Publish the model that the server loads, without it (a value head, a copy of tied weights)"
        )
    if held < numel:
        raise ReplicaRefused(f"{name}: the model's load_weights uses only {held} of {numel} elements. {RELOAD}")
    if held > numel or overlap(regions, "source", numel):
        raise ReplicaRefused(f"{name}: the model keeps elements of it in more than one place. {RELOAD}")


# --- vote -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrepareVote:
    """One rank's vote before a write.

    Attributes:
        refusal: the error, as JSON, that keeps it from writing; None if it can write.
        start: position of its weights.
        target: position after the write.
        share: digest of the elements that it owns, after the write.
    """

    refusal: dict[str, str] | None
    start: Position | None
    target: Position | None
    share: Digest


def vote(find_share: Callable[[], Digest], start: Position | None, target: Position | None) -> PrepareVote:
    """This rank's vote before a write. It never raises: the other ranks wait for it.

    Args:
        find_share: returns this rank's share after the write; raises why it cannot be made.
    """
    try:
        return PrepareVote(None, start, target, find_share())
    except Exception as error:
        return PrepareVote(error_to_json(error), start, target, Digest())


def decide(votes: Sequence[PrepareVote]) -> None:
    """Return if every rank can write and all writes together lead to the target; raise the same error on every rank.

    Raises:
        the first refusal; WrongParent if ranks start from different positions, or the sum of their shares is not the
        target's digest.
    """
    for rank, vote in enumerate(votes):
        if vote.refusal is not None:
            raise error_from_json(vote.refusal, "" if len(votes) == 1 else f"rank {rank}: ")
    target = votes[0].target
    assert target is not None, "only a refusal has none"
    for rank, vote in enumerate(votes):
        if vote.target != target:
            raise WrongParent(f"rank 0 would go to {target}, but rank {rank} to {vote.target}; stage again")
    starts = {vote.start for vote in votes if vote.start != target}
    if len(starts) > 1:
        raise WrongParent(f"the ranks are at different positions: {', '.join(map(str, starts))}")
    total = sum((vote.share for vote in votes), Digest())
    if total.hex != target.digest:
        raise WrongParent(
            f"the delta does not lead to {target} but to digest {total.hex[:12]}; "
            "its bytes are wrong, or it belongs to other weights"
        )
