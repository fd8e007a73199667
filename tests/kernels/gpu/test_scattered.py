"""Elements of many tensors, reached from one address: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.support.on_gpu import DEVICE, in_the_interpreter, on_device

test_in_tritons_interpreter = in_the_interpreter(__file__)
pytestmark = on_device


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_elements_of_several_tensors_are_read_and_written(dtype: torch.dtype) -> None:
    from hubsync.kernels.gpu import scattered

    rng = torch.Generator().manual_seed(1)
    tensors = [torch.randint(0, 100, (size,), generator=rng).to(dtype).to(DEVICE) for size in (3000, 1, 2500)]
    before = [tensor.clone() for tensor in tensors]
    base = min(tensor.data_ptr() for tensor in tensors)
    chosen = [torch.randperm(len(tensor), generator=rng)[: len(tensor) // 2 + 1].to(DEVICE) for tensor in tensors]
    starts = [(tensor.data_ptr() - base) // dtype.itemsize for tensor in tensors]
    places = torch.cat([at + start for at, start in zip(chosen, starts, strict=True)])
    old = torch.cat([tensor[at] for tensor, at in zip(tensors, chosen, strict=True)])
    found = torch.empty_like(old)
    scattered.read(base, places, found)
    assert torch.equal(found, old)
    new = old + 1
    scattered.write(base, places, new)
    for tensor, at, was in zip(tensors, chosen, before, strict=True):
        was[at] += 1
        assert torch.equal(tensor, was)
    for expected, answer in ((new, 0), (old, 1), (torch.cat([new[:-1], old[-1:]]), 1)):
        differs = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        scattered.compare(base, places, expected.contiguous(), differs)
        assert int(differs) == answer


def test_no_elements_are_no_launch() -> None:
    from hubsync.kernels.gpu import scattered

    nothing, bits = torch.zeros(0, dtype=torch.int64, device=DEVICE), torch.zeros(0, dtype=torch.int16, device=DEVICE)
    differs = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    scattered.read(0, nothing, bits)
    scattered.write(0, nothing, bits)
    scattered.compare(0, nothing, bits, differs)
    assert int(differs) == 0
