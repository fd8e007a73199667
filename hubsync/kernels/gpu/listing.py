# mypy: disable-error-code="no-untyped-def"
"""The list of changed elements of many tensors, each once, with its pattern before its first change.

A bit for each element remembers what is listed. So the list of several steps holds each element once, and needs no
sorting: the bits give the order. Nothing in a step waits for the host.

One step, for some tiles: `save` their patterns, let the optimizer update them, `compare`: a bit for each element whose
pattern differs, then one entry for each of these that is not listed yet. An entry is `number << 16 | old pattern`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .numbering import Numbering, address_in, patterns, rounded, tile_of

logger = logging.getLogger(__name__)

_WARPS = 8  # for a tile
_WORDS = 256  # words of bits that one program lists
_ENTRIES = 256  # entries of one program
_GROUP = 256  # elements counted together, to find the place of one in order: their bits are one memory sector
_ROOM = 3  # times the entries so far: what a step may add
_LEAST = 1 << 16
_FIRST = 16  # steps in which nothing is lost
_SHARE = 16  # of the elements: half a byte for each

Ranges = Sequence[tuple[int, int]]
"""Tiles, as ranges (first, end)."""


@dataclass(frozen=True, eq=False)
class Listed:
    """Changed elements in order, on the device.

    Attributes:
        numbers: int64[n], ascending.
        old, new: int16[n], patterns. They differ everywhere.
    """

    numbers: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor


class ChangeList:
    """Changed elements since the list was emptied.

    Memory: an eighth of a byte for each element, and 8 bytes for each entry that there is room for: three times those
    of the steps before, but no more than half a byte for each element, unless there are more entries. During a step
    also 2.125 bytes for each element that is updated together.

    A step that more than triples the list overflows it. What did not fit is not listed, and the next step makes room;
    only the digest of the live tensors shows it. In the first steps, of which each may change many times more than the
    one before (the first one from a bfloat16 checkpoint changes nearly nothing), and while there are too many entries
    to have room for more of them in advance, nothing is lost: every comparison waits for its outcome.
    """

    def __init__(self, numbering: Numbering):
        self.numbering = numbering
        device = numbering.device
        self._bits = torch.zeros(numbering.tiles * numbering.tile // 32, dtype=torch.int32, device=device)
        self._entries = torch.empty(_LEAST, dtype=torch.int64, device=device)
        self._wanted = torch.zeros(1, dtype=torch.int64, device=device)  # entries, had there been room for all
        self._most = max(
            _LEAST, numbering.tiles * numbering.tile // _SHARE
        )  # entries that there is room for in advance
        self._usual = 0  # entries of a list, by those of the last ones
        self._steps = 0
        self._waits = True  # for the outcome of every comparison
        self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    # --- steps --------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make room for a step, from what the steps before took."""
        if self._copied is not None:
            self._copied.synchronize()  # of the step before: passed long ago
        seen = int(self._seen)
        if seen > len(self._entries):
            seen = self._held()
        wanted = _ROOM * max(seen, self._usual)
        if wanted > len(self._entries):
            self._grow(min(wanted, max(seen, self._most)))
        self._waits = self._steps < _FIRST or wanted > len(self._entries)

    def end(self) -> None:
        """Ask for the number of entries, without waiting for it."""
        self._steps += 1
        self._seen.copy_(self._wanted, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def room(self, ranges: Ranges) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for patterns (int16[elements]) and for a bit for each element (uint8[elements / 8]) of these tiles."""
        size, device = _tiles(ranges) * self.numbering.tile, self.numbering.device
        old = torch.empty(size, dtype=torch.int16, device=device)
        return old, torch.empty(size // 8, dtype=torch.uint8, device=device)

    def save(self, ranges: Ranges) -> torch.Tensor:
        """Patterns of these tiles, int16[elements]; undefined behind the end of a tensor."""
        numbers, done = self.numbering, 0
        out, _ = self.room(ranges)
        for first, end in ranges:
            _save[(end - first,)](
                numbers.address, numbers.owner, out[done:], first, numbers.is_aligned, numbers.tile, num_warps=_WARPS
            )
            done += (end - first) * numbers.tile
        return out

    def compare(self, ranges: Ranges, old: torch.Tensor) -> None:
        """List the elements of these tiles whose patterns are no longer `old`, from `save`."""
        numbers, done = self.numbering, 0
        _, marks = self.room(ranges)
        for first, end in ranges:
            _mark[(end - first,)](
                numbers.address, numbers.owner, old[done * numbers.tile :], marks[done * numbers.tile // 8 :], first,
                numbers.is_aligned, numbers.tile, num_warps=_WARPS,
            )  # fmt: skip
            done += end - first
        self.append(ranges, old, marks)

    def append(self, ranges: Ranges, old: torch.Tensor, marks: torch.Tensor) -> None:
        """List the marked elements of these tiles, unless they are listed.

        Args:
            old: int16[elements], their patterns before; needed where marked.
            marks: uint8[elements / 8], a bit for each element, the lowest first.
        """
        self._list(ranges, old, marks)
        if self._waits and int(self._wanted) > len(self._entries):
            self._held()
            self._list(ranges, old, marks)

    def _list(self, ranges: Ranges, old: torch.Tensor, marks: torch.Tensor) -> None:
        tile, done = self.numbering.tile, 0
        marks = marks.view(torch.int32)
        for first, end in ranges:
            words = (end - first) * tile // 32
            _list[(triton.cdiv(words, _WORDS),)](
                marks[done * tile // 32 :], self._bits, old[done * tile :], self._entries, self._wanted,
                len(self._entries), first * tile // 32, words, _WORDS, num_warps=2,
            )  # fmt: skip
            done += end - first

    def _grow(self, capacity: int) -> None:
        """Make room for so many entries. If there is no memory, the list overflows, and digests will show it."""
        try:
            entries = torch.empty(capacity, dtype=torch.int64, device=self.numbering.device)
        except torch.OutOfMemoryError:
            logger.warning(
                "no memory on %s for a list of %d changes: tensors whose changes are not listed will be published with "
                "new values",
                self.numbering.device,
                capacity,
            )
            return
        entries[: len(self._entries)] = self._entries
        self._entries = entries

    # --- publishing ---------------------------------------------------------------------------------

    def collect(self) -> Listed:
        """The elements that differ from their first patterns, in order. `clear` empties the list.

        Changes nothing, so that an error here or later loses nothing. Waits for the device. Needs 22 bytes for each
        entry, and a fifth of a byte for each element.
        """
        numbers, entries = self.numbering, self._entries[: self._held()]
        order = torch.full((len(entries),), torch.iinfo(torch.int64).max, dtype=torch.int64, device=numbers.device)
        now, old, new = (torch.empty(len(entries), dtype=torch.int16, device=numbers.device) for _ in range(3))
        if len(entries) == 0:
            return Listed(order, old, new)
        grid, bits = (triton.cdiv(len(entries), _ENTRIES),), self._bits.clone()
        _settle[grid](numbers.address, numbers.owner, entries, bits, now, len(entries), numbers.tile, _ENTRIES)
        counts = _count_bits(bits)
        ends = counts.cumsum(0, dtype=torch.int64)
        _place[grid](entries, bits, ends - counts, now, order, old, new, len(entries), _GROUP, _ENTRIES)
        left = int(ends[-1])
        return Listed(order[:left], old[:left], new[:left])

    def entries(self) -> torch.Tensor:
        """int64[n]: `number << 16 | first pattern` of each listed element, in no order. Waits for the device."""
        return self._entries[: self._held()].clone()

    def length(self) -> int:
        """Number of listed elements. Waits for the device."""
        return self._held()

    def is_complete(self) -> bool:
        """Whether there was room for everything that was compared. Waits for the device."""
        return int(self._wanted) <= len(self._entries)

    def clear(self) -> None:
        """Empty the list. What it held, if anything, tells how much room the next steps need."""
        self._usual = max(int(self._seen), self._usual * 7 // 8)
        room = max(_LEAST, min(_ROOM * self._usual, self._most))
        if len(self._entries) > 2 * room:  # a single publish of many changes
            self._entries = torch.empty(room, dtype=torch.int64, device=self.numbering.device)
        self._bits.zero_()
        self._wanted.zero_()
        self._seen.zero_()

    def insert(self, earlier: Listed) -> None:
        """Put changes before those of the list: an element of both keeps the earlier pattern."""
        held = self.entries()
        held = held[~torch.isin(held >> 16, earlier.numbers)]
        first = (earlier.numbers << 16) | (earlier.old.to(torch.int64) & 0xFFFF)
        both = torch.cat([first, held])  # before the list is emptied: there may be no memory for it
        self.clear()
        if len(both) > len(self._entries):
            self._entries = both
        else:
            self._entries[: len(both)] = both
        self._wanted.fill_(len(both))
        self._seen.fill_(len(both))
        if len(both):
            _set_bits[(triton.cdiv(len(both), _ENTRIES),)](both, self._bits, len(both), _ENTRIES)

    def _held(self) -> int:
        """Number of entries. Waits for the device."""
        wanted = int(self._wanted)
        if wanted <= len(self._entries):
            return wanted
        held = int(_count_bits(self._bits).sum())  # programs that found no room set no bits, and came after all others
        self._wanted.fill_(held)
        self._waits, self._steps = True, 0
        self._grow(wanted + wanted // 4)
        return held


def _count_bits(bits: torch.Tensor) -> torch.Tensor:
    """int32[elements / 256]: listed elements of each group."""
    groups = len(bits) * 32 // _GROUP
    counts = torch.empty(groups, dtype=torch.int32, device=bits.device)
    _count_groups[(triton.cdiv(groups, 256),)](bits, counts, groups, _GROUP, 256)
    return counts


def _tiles(ranges: Ranges) -> int:
    return sum(end - first for first, end in ranges)


@triton.jit
def ones_of(words):
    """Number of ones in each word of 32 bits."""
    ones = (words & 0x55555555) + ((words >> 1) & 0x55555555)
    ones = (ones & 0x33333333) + ((ones >> 2) & 0x33333333)
    ones = (ones & 0x0F0F0F0F) + ((ones >> 4) & 0x0F0F0F0F)
    ones = ones + (ones >> 8)
    return (ones + (ones >> 16)) & 0x3F


@triton.jit(do_not_specialize=["first"])
def _save(address, owner, out, first, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    base, start, size, kind = tile_of(address, owner, first + program, TILE)
    i = tl.arange(0, TILE)
    bits = patterns(address_in(base, kind, start), kind, i, size, ALIGNED, TILE)
    tl.store(out + program * TILE + i, bits)


@triton.jit(do_not_specialize=["first"])
def _mark(address, owner, old, marks, first, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    base, start, size, kind = tile_of(address, owner, first + program, TILE)
    i = tl.arange(0, TILE)
    bits = patterns(address_in(base, kind, start), kind, i, size, ALIGNED, TILE)
    differ = (tl.load(old + program * TILE + i) != bits) & (i < size)
    by_eight = tl.reshape(differ.to(tl.int32), [TILE // 8, 8])
    byte = tl.sum(by_eight << tl.arange(0, 8)[None, :], axis=1)
    tl.store(marks + program * (TILE // 8) + tl.arange(0, TILE // 8), byte.to(tl.uint8))


@triton.jit(do_not_specialize=["capacity", "first", "count"])
def _list(marks, bits, old, entries, wanted, capacity, first, count, WORDS: tl.constexpr):
    """Append an entry for each marked element that is not listed. `first`: number of the first word."""
    w = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = w < count
    mark = tl.load(marks + w, mask=inside, other=0)
    known = tl.load(bits + first + w, mask=inside, other=0)
    fresh = mark & ~known
    ones = ones_of(fresh)
    total = tl.sum(ones, axis=0)
    if total > 0:
        begin = tl.atomic_add(wanted, total.to(tl.int64), sem="relaxed")
        if begin + total <= capacity:
            tl.store(bits + first + w, known | fresh, mask=fresh != 0)
            slot = begin + tl.cumsum(ones, axis=0) - ones
            for _ in range(0, tl.max(ones, axis=0)):
                some = fresh != 0
                bit = ones_of((fresh & -fresh) - 1)
                pattern = tl.load(old + w * 32 + bit, mask=some, other=0)
                number = (first + w) * 32 + bit
                tl.store(entries + slot, (number << 16) | (pattern.to(tl.int64) & 0xFFFF), mask=some)
                fresh = fresh & (fresh - 1)
                slot += some.to(tl.int64)


@triton.jit(do_not_specialize=["n"])
def _settle(address, owner, entries, bits, now, n, TILE: tl.constexpr, ENTRIES: tl.constexpr):
    """Read the patterns of listed elements, and clear the bits of those that have their first pattern again."""
    e = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = e < n
    entry = tl.load(entries + e, mask=inside, other=0)
    number = entry >> 16
    base, start, _, kind = tile_of(address, owner, number // TILE, TILE)
    at = address_in(base, kind, start + number % TILE)
    raw = tl.load(at.to(tl.pointer_type(tl.int16)), mask=inside & (kind == 0), other=0)
    single = tl.load(at.to(tl.pointer_type(tl.float32)), mask=inside & (kind != 0), other=0.0)
    pattern = tl.where(kind == 0, raw, rounded(single, kind))
    tl.store(now + e, pattern, mask=inside)
    back = inside & (pattern == entry.to(tl.int16))
    one = tl.full([ENTRIES], 1, tl.int32) << (number & 31).to(tl.int32)
    tl.atomic_and(bits + (number >> 5), ~one, mask=back, sem="relaxed")


@triton.jit(do_not_specialize=["groups"])
def _count_groups(bits, counts, groups, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    g = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = g[:, None] * (GROUP // 32) + tl.arange(0, GROUP // 32)[None, :]
    words = tl.load(bits + at, mask=(g < groups)[:, None], other=0)
    tl.store(counts + g, tl.sum(ones_of(words), axis=1), mask=g < groups)


@triton.jit(do_not_specialize=["n"])
def _place(entries, bits, before, now, numbers, olds, news, n, GROUP: tl.constexpr, ENTRIES: tl.constexpr):
    """Write each entry whose bit is set to its place in order. `before`: set bits before each group."""
    e = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = e < n
    entry = tl.load(entries + e, mask=inside, other=0)
    number = entry >> 16
    group, bit = number // GROUP, (number % GROUP).to(tl.int32)
    word = tl.arange(0, GROUP // 32)[None, :]
    words = tl.load(bits + group[:, None] * (GROUP // 32) + word, mask=inside[:, None], other=0)
    one = tl.full([ENTRIES], 1, tl.int32) << (bit & 31)
    own = word == (bit >> 5)[:, None]
    below = tl.where(own, one[:, None] - 1, tl.where(word < (bit >> 5)[:, None], -1, 0))
    slot = tl.load(before + group, mask=inside, other=0) + tl.sum(ones_of(words & below), axis=1)
    keep = inside & (tl.sum((own & ((words & one[:, None]) != 0)).to(tl.int32), axis=1) != 0)
    tl.store(numbers + slot, number, mask=keep)
    tl.store(olds + slot, entry.to(tl.int16), mask=keep)
    tl.store(news + slot, tl.load(now + e, mask=keep, other=0), mask=keep)


@triton.jit(do_not_specialize=["n"])
def _set_bits(entries, bits, n, ENTRIES: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    number = tl.load(entries + e, mask=e < n, other=0) >> 16
    one = tl.full([ENTRIES], 1, tl.int32) << (number & 31).to(tl.int32)
    tl.atomic_or(bits + (number >> 5), one, mask=e < n, sem="relaxed")
