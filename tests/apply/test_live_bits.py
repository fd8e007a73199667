"""Old patterns for the decoder of compact deltas: rectangles of checkpoint tensors, read from a worker's layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hubsync.apply.applier import Applier
from hubsync.errors import ReplicaRefused
from hubsync.format.digest import digest_view
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Position
from hubsync.format.parts import Transition, read_delta, write_delta
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.format.view_bits import ViewBits
from hubsync.kernels.bits import bits_of
from tests.support.sharded import SIZE, Meeting
from tests.support.toy import TABLE, Tensors, loaded, nudged, patch_between
from tests.support.toy import view as random_view

CPU = torch.device("cpu")


def test_every_rectangle_equals_that_of_the_view() -> None:
    """Fused, padded, transposed, permuted, tied; 8, 16 and 32 bits wide."""
    tensors = random_view(0)
    old = Applier(loaded(tensors), TABLE, CPU).old_bits()
    for index, spec in enumerate(TABLE):
        rows, cols = (slice(size // 3, max(1, size - size // 4)) for size in spec.matrix)
        expected = bits_of(tensors[spec.name]).reshape(spec.matrix)[rows, cols]
        found = old.rectangle(index, rows, cols)
        assert isinstance(found, np.ndarray)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected), spec.name


# Large enough to be cut for two ranks; and a bias, which is not.
LARGE = TensorTable(
    [
        TensorSpec("rows", (1024, 1024), "BF16"),
        TensorSpec("cols", (1024, 1024), "BF16"),
        TensorSpec("bias", (1024,), "BF16"),
        TensorSpec("norm", (64,), "BF16"),
        TensorSpec("elsewhere", (1024, 512), "BF16"),
    ]
)


class Shard(nn.Module):
    """One of two ranks. Only the last one has `elsewhere`."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank
        shapes = {"rows": (512, 1024), "cols": (1024, 512), "bias": (512,), "norm": (64,)}
        if rank == SIZE - 1:
            shapes["elsewhere"] = (1024, 512)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16), requires_grad=False))

    def load_weights(self, weights):  # type: ignore[no-untyped-def]
        half = slice(512 * self.rank, 512 * (self.rank + 1))
        for name, tensor in weights:
            if name == "cols":
                tensor = tensor[:, half]
            elif name in ("rows", "bias"):
                tensor = tensor[half]
            if hasattr(self, name):
                getattr(self, name).data.copy_(tensor)


def weights(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: (torch.randn(spec.shape, generator=generator) * 0.02).bfloat16() for spec in LARGE}


def test_each_of_two_ranks_decodes_its_own_part() -> None:
    before, after = weights(0), nudged(weights(0), 1, 0.01)
    start, target = (
        Position(version, digest_view(LARGE, tensors).hex) for version, tensors in enumerate((before, after))
    )
    part = write_delta(
        LARGE,
        patch_between(before, after, LARGE),
        Transition("0" * 32, start, target),
        encoding=Encoding.COMPACT,
        old=ViewBits(LARGE, before),
    )
    appliers = []
    for rank, seat in enumerate(Meeting().ranks()):
        model = Shard(rank)
        model.load_weights(before.items())
        appliers.append(Applier(model, LARGE, CPU, group=seat))
    inventories = [applier.inventory() for applier in appliers]
    shares = []
    for applier in appliers:
        assert applier.join(inventories).hex == start.digest
        applier.adopt(start)
        patch = read_delta(part, LARGE, None, applier.old_bits())
        assert len(patch[0]) < len(patch_between(before, after, LARGE)[0]), "only what this rank holds"
        shares.append(applier.stage_patch(patch, target).sums.owned)
    assert (shares[0] + shares[1]).hex == target.digest


def test_a_partly_held_chunk_is_refused_with_the_remedy() -> None:
    table = TensorTable([TensorSpec("w", (8, 8), "BF16")])

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4, 8, dtype=torch.bfloat16), requires_grad=False)

        def load_weights(self, weights):  # type: ignore[no-untyped-def]
            for _, tensor in weights:
                self.w.data.copy_(tensor[:4])

    old = Applier(Half(), table, CPU, group=Meeting().ranks()[0]).old_bits()
    assert old.rectangle(0, slice(0, 4), slice(0, 8)) is not None
    assert old.rectangle(0, slice(4, 8), slice(0, 8)) is None
    with pytest.raises(ReplicaRefused, match="w: this worker holds only a part of a chunk"):
        old.rectangle(0, slice(0, 8), slice(0, 8))
