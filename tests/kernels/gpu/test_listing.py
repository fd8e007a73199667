"""The list of changed elements, on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.on_gpu import DEVICE, in_the_interpreter, on_device

test_in_tritons_interpreter = in_the_interpreter(__file__)
pytestmark = on_device

TILE = 256
DTYPES = pytest.mark.parametrize(
    ("live", "published"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)],
    ids=str,
)


class Model:
    """Flat tensors and what changes of them are expected."""

    def __init__(self, live: torch.dtype, published: torch.dtype, sizes: tuple[int, ...] = (700, 1, 256, 1030, 40)):
        from hubsync.kernels.gpu.listing import ChangeList
        from hubsync.kernels.gpu.numbering import Numbering, kind_of

        self.rng = torch.Generator().manual_seed(0)
        self.published = published
        self.tensors = [(torch.randn(size, generator=self.rng) * 0.02).to(live).to(DEVICE) for size in sizes]
        kind = kind_of(live, published)
        assert kind is not None
        self.numbering = Numbering(self.tensors, [kind] * len(sizes), TILE)
        self.list = ChangeList(self.numbering)
        self.start = self.patterns()

    def patterns(self) -> list[np.ndarray]:
        return [t.to(self.published).view(torch.int16).cpu().numpy().copy() for t in self.tensors]

    def step(self, share: float = 0.1, tensors: tuple[int, ...] | None = None, undo: bool = False) -> None:
        """Change a share of these tensors' elements, as an optimizer does."""
        some = range(len(self.tensors)) if tensors is None else tensors
        ranges = self.numbering.ranges(list(some))
        old = self.list.save(ranges)
        for t in some:
            hit = (torch.rand(len(self.tensors[t]), generator=self.rng) < share).to(DEVICE)
            self.tensors[t].mul_(torch.where(hit, 0.984375 if undo else 1.015625, 1.0).to(self.tensors[t].dtype))
        self.list.compare(ranges, old)

    def expect_listed(self) -> None:
        listed = self.list.collect()
        numbers, old, new = (column.cpu().numpy() for column in (listed.numbers, listed.old, listed.new))
        now = self.patterns()
        changed = [np.flatnonzero(a != b) for a, b in zip(self.start, now, strict=True)]
        first = self.numbering.first
        assert np.array_equal(numbers, np.concatenate([first[t] + at for t, at in enumerate(changed)]))
        assert np.array_equal(old, np.concatenate([a[at] for a, at in zip(self.start, changed, strict=True)]))
        assert np.array_equal(new, np.concatenate([a[at] for a, at in zip(now, changed, strict=True)]))


@DTYPES
def test_changes_of_one_step_are_listed_in_order(live: torch.dtype, published: torch.dtype) -> None:
    model = Model(live, published)
    model.list.begin()
    model.step()
    model.list.end()
    model.expect_listed()


@DTYPES
def test_an_element_that_changes_in_several_steps_is_listed_once(live: torch.dtype, published: torch.dtype) -> None:
    model = Model(live, published)
    for _ in range(3):
        model.list.begin()
        model.step()
        model.step(tensors=(0, 2, 3))
        model.list.end()
    model.expect_listed()


def test_elements_that_return_to_their_first_bits_are_not_changes() -> None:
    model = Model(torch.bfloat16, torch.bfloat16)
    kept = [tensor.clone() for tensor in model.tensors]
    model.step(0.5)
    old = model.list.save([(0, model.numbering.tiles)])
    for tensor, before in zip(model.tensors[:3], kept, strict=False):
        tensor.copy_(before)
    model.list.compare([(0, model.numbering.tiles)], old)
    model.expect_listed()
    assert int((model.list.collect().numbers < model.numbering.first[3]).sum()) == 0


def test_collecting_changes_nothing() -> None:
    """What was collected may never be published: an element that had returned to its first bits is still listed."""
    model = Model(torch.bfloat16, torch.bfloat16)
    kept = [tensor.clone() for tensor in model.tensors]
    model.step(0.5)
    for tensor, before in zip(model.tensors, kept, strict=True):
        tensor.copy_(before)
    bits, entries = model.list._bits.clone(), model.list.entries()
    assert len(model.list.collect().numbers) == 0 < len(entries)
    assert torch.equal(model.list._bits, bits)
    assert torch.equal(model.list.entries(), entries)
    model.step(0.5)
    model.expect_listed()


def test_a_cleared_list_begins_anew() -> None:
    model = Model(torch.float32, torch.bfloat16)
    model.step()
    model.expect_listed()
    model.list.clear()
    model.start = model.patterns()
    assert len(model.list.collect().numbers) == 0
    model.step()
    model.expect_listed()


def test_nothing_is_lost_while_the_size_of_a_list_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from hubsync.kernels.gpu import listing

    monkeypatch.setattr(listing, "_LEAST", 16)
    monkeypatch.setattr(listing, "_WORDS", 32)
    model = Model(torch.float32, torch.bfloat16)
    model.list.begin()
    for t in range(5):
        model.step(0.9, (t,))
    model.list.end()
    model.expect_listed()


def test_a_list_that_overflows_holds_what_fitted_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    from hubsync.kernels.gpu import listing

    monkeypatch.setattr(listing, "_LEAST", 64)
    monkeypatch.setattr(listing, "_WORDS", 8)
    model = Model(torch.float32, torch.bfloat16)
    model.list.begin()
    model.step(0.01)
    model.list.end()
    model.list.begin()
    model.step(0.9)  # more than three times what fitted
    model.list.end()
    listed = model.list.collect()
    numbers, old = listed.numbers.cpu().numpy(), listed.old.cpu().numpy()
    start = np.zeros(int(model.numbering.first[-1]), np.int16)
    for first, patterns in zip(model.numbering.first, model.start, strict=False):
        start[first : first + len(patterns)] = patterns
    assert len(numbers) > 0
    assert (np.diff(numbers) > 0).all()
    assert np.array_equal(old, start[numbers])
    model.list.clear()
    model.start = model.patterns()
    model.list.begin()
    model.step(0.9)
    model.list.end()
    model.expect_listed()


def test_changes_that_failed_to_be_published_come_first() -> None:
    model = Model(torch.float32, torch.bfloat16)
    model.step(0.3)
    earlier = model.list.collect()
    model.list.clear()
    model.step(0.3)
    model.list.insert(earlier)
    model.step(0.3)
    model.expect_listed()


def test_replaced_memory_is_found_after_refresh() -> None:
    model = Model(torch.float32, torch.bfloat16)
    model.step()
    model.tensors = [tensor.clone() for tensor in model.tensors]
    model.numbering.refresh(model.tensors)
    model.step()
    model.expect_listed()


def test_ranges_join_neighbours() -> None:
    numbering = Model(torch.float32, torch.bfloat16).numbering
    assert numbering.ranges([0, 1, 2, 3, 4]) == [(0, numbering.tiles)]
    assert numbering.ranges([4, 0, 1]) == [(0, 4), (numbering.tiles - 1, numbering.tiles)]
    assert numbering.ranges([]) == []


def test_not_a_number_is_rounded_as_the_device_rounds_it() -> None:
    model = Model(torch.float32, torch.bfloat16, (300,))
    old = model.list.save([(0, 2)])
    model.tensors[0][7] = torch.nan if DEVICE == "cuda" else -torch.inf  # torch rounds it otherwise in main memory
    model.tensors[0][8] = torch.inf
    model.list.compare([(0, 2)], old)
    model.expect_listed()


def test_an_empty_list_does_not_give_up_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    from hubsync.kernels.gpu import listing

    monkeypatch.setattr(listing, "_LEAST", 8)
    monkeypatch.setattr(listing, "_SHARE", 1)
    model = Model(torch.float32, torch.bfloat16)
    for publishes_without_a_step in (0, 2):
        model.list.begin()
        model.step(0.2)
        model.list.end()
        model.expect_listed()
        for _ in range(1 + publishes_without_a_step):
            model.list.clear()
        model.start = model.patterns()
    model.list.begin()
    model.step(0.3)
    model.list.end()
    model.expect_listed()
