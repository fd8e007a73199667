"""Hidden copies: memory that an engine computes with, holding weights that a commit would not change.

A layer, or an object that it uses, may keep a cast or a rearranged copy of a parameter that was made once after
loading: attention sinks in float32, absorbed or packed matrices. Such a copy is no parameter, so that the digest of the
live weights is right while forward passes compute with old weights. It is recognised by its values, whatever its name:

* as many elements as a parameter, and the same values in any order, or
* runs of the same values along any of its dimensions: the whole of a parameter, a part of one, or several together.

Only samples are compared, so that the cost depends on the number of tensors, and little on their size. Values of fewer
than three kinds (ones, zeros) say nothing and are skipped, and so are single numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

_RUN = 8  # consecutive elements that are compared as one; of random bfloat16 weights, 80 bits of information
_VARIED = 5  # different values that such a run must have
_HASHED = 1 << 20  # runs of a suspect that are hashed, along each dimension
_EXPECTED = 256  # runs found in a copy, on average, if it keeps all runs
_ENOUGH = 3  # runs that make it a copy
_SMALLEST_PART = 64  # a copy of a part is found if it has at least this fraction of the parameter's elements
_SAMPLE = 1 << 12  # elements of a suspect that are looked at first
_PIECE = 1 << 24  # elements that are summed at once

# Odd, random numbers of 63 bits, one for each element of a run.
_FACTORS = (
    0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179, 0x3C6EF372FE94F82B, 0x254FF53A5F1D36F1,
    0x510E527FADE682D1, 0x1B05688C2B3E6C1F, 0x6A09E667F3BCC909, 0x3B67AE8584CAA73B,
)  # fmt: skip


@dataclass(frozen=True)
class Copy:
    """A hidden copy.

    Attributes:
        path: where it is, by attributes from the model.
        source: name of the parameter that it holds values of.
    """

    path: str
    source: str


def find_copies(
    reachable: Iterable[tuple[str, torch.Tensor]], followed: Mapping[str, torch.Tensor], written: Iterable[torch.Tensor]
) -> list[Copy]:
    """Tensors that hold values of followed ones in memory of their own. At most one source is named for each.

    Args:
        reachable: (path, tensor) of all tensors that forward passes may read.
        followed: parameters that a commit changes, by name.
        written: other tensors whose memory a commit writes or computes again: they are no suspects.
    """
    solid = {tensor.untyped_storage().data_ptr() for tensor in (*followed.values(), *written)}
    suspects = list(_suspects(reachable, solid))
    if not suspects:
        return []
    found: dict[str, str] = {}
    distinct = _distinct(followed)
    for dtype in dict.fromkeys(tensor.dtype for _, tensor in suspects):
        group = [(path, tensor) for path, tensor in suspects if tensor.dtype == dtype]
        index = _RunIndex([tensor for _, tensor in group])
        sums = _Sums([tensor for _, tensor in group])
        for name, tensor in distinct.items():
            for number in sorted({*sums.equal(tensor, dtype), *index.sharing(tensor, dtype)}):
                found.setdefault(group[number][0], name)
    return [Copy(path, source) for path, source in found.items()]


def _suspects(reachable: Iterable[tuple[str, torch.Tensor]], solid: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Floating point tensors in other memory than that, each view of it once."""
    seen: set[tuple[object, ...]] = set()
    for path, tensor in reachable:
        if not _is_plain(tensor) or tensor.numel() < 2:
            continue
        address = tensor.untyped_storage().data_ptr()
        view = address, tensor.storage_offset(), tensor.shape, tensor.stride()
        if address in solid or view in seen:
            continue
        seen.add(view)
        yield path, tensor.detach()


def _is_plain(tensor: torch.Tensor) -> bool:
    """Can its values be read, and are they floating point numbers?"""
    plain = not tensor.is_meta and tensor.layout == torch.strided and not tensor.is_quantized
    return plain and tensor.dtype.is_floating_point and tensor.element_size() > 1


def _distinct(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each view of memory once."""
    views: dict[tuple[object, ...], tuple[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if _is_plain(tensor) and tensor.numel():
            views.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), (name, tensor.detach()))
    return dict(views.values())


def _patterns(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bits of values that were cast to `dtype` and then to float32, int64; of equal numbers the same in any dtype."""
    exact = values.to(dtype).to(torch.float32)
    return (exact + 0.0).view(torch.int32).to(torch.int64)  # -0 is 0


# --- the same values in another order -------------------------------------------------------------------


class _Sums:
    """Suspects by size and by a sum that does not depend on the order of their elements."""

    def __init__(self, suspects: Sequence[torch.Tensor]):
        self._by_size: dict[int, list[int]] = {}
        self._suspects = suspects
        self._sums: dict[int, int | None] = {}
        for number, suspect in enumerate(suspects):
            self._by_size.setdefault(suspect.numel(), []).append(number)

    def equal(self, tensor: torch.Tensor, dtype: torch.dtype) -> list[int]:
        """Numbers of the suspects that hold the same values. A tensor of another size is not read."""
        same_size = self._by_size.get(tensor.numel(), [])
        own = _sum(tensor, dtype) if same_size else None
        return [] if own is None else [number for number in same_size if self._sum(number) == own]

    def _sum(self, number: int) -> int | None:
        if number not in self._sums:
            suspect = self._suspects[number]
            self._sums[number] = _sum(suspect, suspect.dtype)
        return self._sums[number]


def _sum(tensor: torch.Tensor, dtype: torch.dtype) -> int | None:
    """Modulo 2^64, of one number for each element's value. None if there are too few different values."""
    flat, total = tensor.reshape(-1), 0
    if len(flat[:_PIECE].to(dtype).unique()) < min(3, len(flat)):
        return None
    for first in range(0, len(flat), _PIECE):
        mixed = _patterns(flat[first : first + _PIECE], dtype) * _FACTORS[0]
        mixed = (mixed ^ (mixed >> 29)) * _FACTORS[1]
        total += int((mixed ^ (mixed >> 32)).sum())
    return total % (1 << 64)


# --- runs of the same values ----------------------------------------------------------------------------


class _RunIndex:
    """Hashes of runs of suspects, sorted."""

    def __init__(self, suspects: Sequence[torch.Tensor]):
        self._sizes = [tensor.numel() for tensor in suspects]
        hashes, owners = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        for number, suspect in enumerate(suspects):
            if not _is_varied(suspect):
                continue
            for dimension in range(suspect.ndim):
                found = _hashes(_runs(suspect, dimension, _HASHED), suspect.dtype).cpu()
                hashes.append(found)
                owners.append(torch.full_like(found, number))
        self._hashes, order = torch.cat(hashes).sort()
        self._owners = torch.cat(owners)[order]

    def sharing(self, tensor: torch.Tensor, dtype: torch.dtype) -> list[int]:
        """Numbers of the suspects that share runs with this tensor."""
        count = self._samples(tensor.numel())
        if not count or not len(self._hashes):
            return []
        hits: dict[int, int] = {}
        for dimension in range(tensor.ndim):
            runs = _runs(tensor, dimension, count)
            varied = (runs.sort(dim=1).values.diff(dim=1) != 0).sum(1) >= _VARIED - 1
            wanted = _hashes(runs[varied], dtype).unique().cpu()
            places = torch.searchsorted(self._hashes, wanted).clamp(max=len(self._hashes) - 1)
            for number in self._owners[places[self._hashes[places] == wanted]].tolist():
                hits[number] = hits.get(number, 0) + 1
        return [number for number, runs_found in hits.items() if runs_found >= _ENOUGH]

    def _samples(self, numel: int) -> int:
        """How many runs of a parameter of this size to look for."""
        rates = [
            max(numel, size) / min(size, _HASHED)
            for size in self._sizes
            if size * _SMALLEST_PART >= numel and size >= _RUN
        ]
        return math.ceil(_EXPECTED * min(max(rates), _SMALLEST_PART)) if rates else 0


def _is_varied(tensor: torch.Tensor) -> bool:
    """Has it many different values? Workspaces and caches of an idle engine have not."""
    flat = _flat(tensor)
    return len(flat[:: max(1, len(flat) // _SAMPLE)].unique()) >= _VARIED


def _runs(tensor: torch.Tensor, dimension: int, count: int) -> torch.Tensor:
    """Runs of `_RUN` elements along a dimension, [n, _RUN]: all of them, or `count` that are chosen at random."""
    shape = list(tensor.shape)
    shape[dimension] -= _RUN - 1
    if shape[dimension] <= 0:
        return tensor.new_empty((0, _RUN))
    total = math.prod(shape)
    generator = torch.Generator().manual_seed(total)
    chosen = torch.arange(total) if total <= count else torch.randint(total, (count,), generator=generator)
    offsets = torch.zeros_like(chosen)
    for size, stride in zip(reversed(shape), reversed(tensor.stride()), strict=True):
        offsets += chosen % size * stride
        chosen = chosen // size
    places = offsets[:, None] + torch.arange(_RUN) * tensor.stride(dimension)
    return _flat(tensor)[places.to(tensor.device)]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """All memory from the first element of a tensor to the last one. No copy."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((length,), (1,), tensor.storage_offset())


def _hashes(runs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    factors = torch.tensor(_FACTORS, device=runs.device)
    return (_patterns(runs, dtype) * factors).sum(1)
