"""Digests of all tensors in one launch, on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hubsync.format.digest import Digest, device_constants, digest_range, key_of, tensor_seed
from tests.support.on_gpu import DEVICE, in_the_interpreter, on_device

test_in_tritons_interpreter = in_the_interpreter(__file__)
pytestmark = on_device

SIZES = (70_000, 1, 2048, 5000)
# live tensor, first element, elements, flat index: parts of tensors, shards that begin inside a block, an empty one
SPANS = np.array(
    [[0, 0, 70_000, 0], [1, 0, 1, 5], [2, 8, 2040, 3000], [3, 0, 2500, 2048], [3, 2500, 2500, 0], [3, 0, 0, 0]]
)
SEEDS = [tensor_seed(f"model.{number}") for number in range(len(SPANS))]


def made(live: torch.dtype):
    from hubsync.kernels.gpu.digest import Digests
    from hubsync.kernels.gpu.numbering import Numbering, kind_of

    rng = torch.Generator().manual_seed(3)
    tensors = [torch.randn(size, generator=rng).to(live).to(DEVICE) for size in SIZES]
    kind = kind_of(live, torch.bfloat16)
    assert kind is not None
    numbering = Numbering(tensors, [kind] * len(SIZES), 1024)
    keys = np.array([key_of(seed) for seed in SEEDS], np.int64)
    return tensors, numbering, Digests(numbering, SPANS, keys, device_constants(torch.device(DEVICE)))


def expected(tensors: list[torch.Tensor]) -> list[Digest]:
    found = []
    for seed, (live, start, size, flat) in zip(SEEDS, SPANS.tolist(), strict=True):
        bits = tensors[live][start : start + size].bfloat16().view(torch.int16).cpu().numpy().view(np.uint16)
        found.append(digest_range(seed, bits, flat))
    return found


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16], ids=str)
def test_digests_of_live_elements_are_those_of_the_format(live: torch.dtype) -> None:
    tensors, _, digests = made(live)
    assert [Digest.signed(*pair) for pair in digests.live().tolist()] == expected(tensors)


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16], ids=str)
def test_changes_lead_from_one_digest_to_the_other(live: torch.dtype) -> None:
    from hubsync.kernels.gpu.listing import ChangeList

    tensors, numbering, digests = made(live)
    before = expected(tensors)
    changes = ChangeList(numbering)
    ranges = [(0, numbering.tiles)]
    old = changes.save(ranges)
    for tensor in tensors:
        tensor[::17] *= 1.25
    changes.compare(ranges, old)
    added, counts = digests.changes(changes.collect())
    found = [start + Digest.signed(*pair) for start, pair in zip(before, added.tolist(), strict=True)]
    assert found == expected(tensors)
    assert counts.tolist() == [sum(i % 17 == 0 for i in range(s, s + n)) for _, s, n, _ in SPANS.tolist()]


def test_no_changes_add_nothing() -> None:
    from hubsync.kernels.gpu.listing import ChangeList

    _, numbering, digests = made(torch.float32)
    added, counts = digests.changes(ChangeList(numbering).collect())
    assert not added.any()
    assert not counts.any()


@pytest.mark.parametrize(
    ("start", "flat", "aligned"), [(0, 0, True), (8, 8, True), (3, 3, True), (8, 3, False), (3, 0, False)]
)
def test_blocks_are_loaded_in_vectors_only_where_they_are_aligned(start: int, flat: int, aligned: bool) -> None:
    """A vector load from another address ends the process on a GPU. The interpreter would not notice."""
    from hubsync.kernels.gpu.digest import Digests
    from hubsync.kernels.gpu.numbering import RAW, Numbering

    live = torch.zeros(5000, dtype=torch.bfloat16, device=DEVICE)
    spans = np.array([[0, start, 4000, flat]])
    constants = device_constants(torch.device(DEVICE))
    assert Digests(Numbering([live], [RAW]), spans, np.array([1]), constants).is_aligned == aligned
