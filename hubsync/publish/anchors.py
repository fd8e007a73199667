"""The files of an anchor when the view is divided among ranks: gathered one tensor at a time, each on one rank.

A tensor of an anchor lies in one file, so this is the one place where a tensor is put together from its shards. File by
file the ranks take turns: who has the turn receives the tensors of the file and writes it, so that memory, disk and
upload are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hubsync.format.parts import anchor_files, write_anchor, write_anchor_file, write_anchor_index
from hubsync.kernels.bits import TORCH_DTYPES
from hubsync.publish.detect.base import Detector
from hubsync.publish.detect.snapshot import Snapshot
from hubsync.publish.view.shards import Shard

from .ranks import Ranks


def write_own_files(
    directory: Path,
    snapshot: Detector,
    division: Sequence[Sequence[Shard]],
    ranks: Ranks,
    max_shard_bytes: int,
    stem: str = "model",
) -> None:
    """Write this rank's files of an anchor of the snapshot; rank 0's has the index. Rounds of `ranks`.

    Args:
        division: rank -> what it owns of each tensor.
        max_shard_bytes: of a file; also what is held in memory at a time.
        stem: of the names of the files.
    """
    table = snapshot.table
    if ranks.size == 1:
        write_anchor(directory, table, snapshot.tensors(), max_shard_bytes=max_shard_bytes, stem=stem)
        return
    assert isinstance(snapshot, Snapshot), "several ranks each hold their part"
    files = anchor_files(table, max_shard_bytes, stem)
    for number, (file, names) in enumerate(files.items()):
        turn = number % ranks.size
        gathered = {}
        for name in names:
            tensor = _gathered(snapshot, division, ranks, table.index_of(name), turn)
            if tensor is not None:
                gathered[name] = tensor
        # A round, so that all stop here if the disk of one is full.
        ranks.together(lambda: write_anchor_file(directory / file, gathered) if gathered else None)  # noqa: B023
    ranks.first(lambda: write_anchor_index(directory, table, files))


def _gathered(
    snapshot: Snapshot, division: Sequence[Sequence[Shard]], ranks: Ranks, index: int, to: int
) -> torch.Tensor | None:
    """The whole of one tensor, on the CPU of rank `to`; None elsewhere."""
    spec = snapshot.table[index]
    width = spec.width // 8
    mine = snapshot.part(index).cpu().view(torch.uint8)
    parts = ranks.collect(mine, [shards[index].numel * width for shards in division], to)
    if parts is None:
        return None
    whole = torch.empty(spec.numel, dtype=TORCH_DTYPES[spec.dtype], device="cpu")
    into = whole.view(torch.uint8).view(-1, width)
    for part, shards in zip(parts, division, strict=True):
        elements = part.view(-1, width)
        for first, last, indices in shards[index].pieces():
            into[torch.from_numpy(indices)] = elements[first:last]
    return whole.view(spec.shape)
