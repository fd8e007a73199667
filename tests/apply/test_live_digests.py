"""Digests of many regions in one launch are those of each region, on a GPU if there is one, else interpreted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hubsync import kernels
from hubsync.apply.applier import Applier
from hubsync.apply.regions import block
from hubsync.apply.sweep import Sweeper
from hubsync.errors import ReplicaPoisoned
from hubsync.format.digest import digest_view
from hubsync.format.manifest import Position
from hubsync.format.table import TensorSpec, TensorTable
from tests.support.on_gpu import DEVICE, INTERPRETED, in_the_interpreter, on_device

test_in_tritons_interpreter = in_the_interpreter(__file__)

TABLE = TensorTable(
    [
        TensorSpec("q", (130, 601), "BF16"),
        TensorSpec("k", (3, 601), "BF16"),
        TensorSpec("wide", (5, 1100), "F16"),
        TensorSpec("narrow", (40, 30), "BF16"),
        TensorSpec("scale", (7,), "F32"),
        TensorSpec("norm", (601,), "BF16"),
    ]
)
WIDE, NARROW = 550, 15  # columns of each half: runs long enough to be read together, and others


class Halves(nn.Module):
    """Fused rows, and matrices of which the halves lie one after the other, as slices of columns do."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape, dtype in [
            ("qk", (133 * 601 + 1,), torch.bfloat16),
            ("wide", (2, 5, WIDE), torch.float16),
            ("narrow", (2, 40, NARROW), torch.bfloat16),
            ("scale", (7,), torch.float32),
            ("norm", (601,), torch.bfloat16),
        ]:
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))

    def load_weights(self, weights) -> None:
        for name, tensor in weights:
            if name == "q":  # not at a multiple of 16 bytes
                self.qk.data[1 : 130 * 601 + 1].copy_(tensor.reshape(-1))
            elif name == "k":
                self.qk.data[130 * 601 + 1 :].copy_(tensor.reshape(-1))
                self.qk.data[:1].fill_(0)
            elif name in ("wide", "narrow"):
                target = getattr(self, name).data
                for half in range(2):
                    target[half].copy_(tensor[:, half * target.shape[2] : (half + 1) * target.shape[2]])
            else:
                getattr(self, name).data.copy_(tensor)


@pytest.fixture
def applier(monkeypatch: pytest.MonkeyPatch) -> Applier:
    if INTERPRETED:
        monkeypatch.setattr(kernels, "on_gpu", lambda tensor: True)
    rng = torch.Generator().manual_seed(1)
    tensors = {
        spec.name: torch.randn(spec.shape, generator=rng).to(
            {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[spec.dtype]
        )
        for spec in TABLE
    }
    with torch.device(DEVICE):
        model = Halves()
    model.load_weights(tensors.items())
    applier = Applier(model, TABLE, model.norm.device)
    position = Position(0, digest_view(TABLE, tensors).hex)
    assert applier.join([applier.inventory()]).hex == position.digest
    applier.adopt(position)
    return applier


def test_runs_of_a_block_are_its_elements_in_order() -> None:
    made = block(0, (3, 4, 10), 7, (100, 20, 1), 5, (40, 10, 1))
    assert made is not None
    sources, targets = made.runs()
    every = np.arange(made.run)
    np.testing.assert_array_equal((sources[:, None] + every).reshape(-1), made.indices(np.arange(made.numel)))
    np.testing.assert_array_equal((targets[:, None] + every).reshape(-1), made.offsets(np.arange(made.numel)))


@on_device
def test_regions_of_long_runs_are_read_together(applier: Applier) -> None:
    live = applier.live
    assert live.together is not None
    together = {TABLE[live.parts[number].index].name for number in live.numbers_together.tolist()}
    assert together == {"q", "k", "wide", "norm"}
    assert {TABLE[part.index].name for part in live.apart} == {"narrow", "scale"}
    with live.aside():
        expected = [live.digest_of(part.index, part.region) for part in live.parts]
    found = live.digests()
    assert found.tolist() == [[digest.a, digest.b] for digest in expected]


@on_device
@pytest.mark.parametrize("elements", [20_000, 200_000, 1 << 24])
def test_a_flipped_bit_is_found_in_slices(applier: Applier, elements: int) -> None:
    def sweep() -> int:
        return next(count for count in range(1, 1000) if sweeper.slice(elements))

    sweeper = Sweeper(applier)
    assert (sweep() == 1) == (elements == 1 << 24)
    sweep()
    bits = applier._map.storages[1].bits
    assert applier._map.storages[1].name == "wide"
    bits[-1] ^= 1
    with pytest.raises(ReplicaPoisoned, match="wide differs"):
        sweep()


@on_device
def test_memory_that_moved_is_read_where_it_is(applier: Applier) -> None:
    """No check of addresses is involved: digests are those of the tensors that the map holds."""
    before = applier.live.digests()
    storage = applier._map.storages[0]
    storage.bits = storage.bits.clone()
    applier.live.together._storages[0] = storage.bits
    storage.bits[5] ^= 1
    changed = (applier.live.digests() != before).any(axis=1)
    assert changed.sum() == 1
