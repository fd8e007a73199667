"""How many elements of which tensor each version changes, read from the beginnings of its parts.

A run may have thousands of versions, and a part may have gigabytes. So at most `MOST_VERSIONS` versions are read,
evenly spaced, of each part only what lies before its payload, and `BUDGET` bytes in all. Beginnings are compared with
no hash: what they say is for eyes only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hubsync.bucket.base import Bucket
from hubsync.chain import ChainReader
from hubsync.chain.layout import Layout
from hubsync.errors import FormatError, HubsyncError
from hubsync.format.beginnings import FIRST_BYTES, read_counts, wanted_bytes
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Manifest
from hubsync.format.patch import TensorDelta
from hubsync.format.table import TensorTable

from .floor import difference_bits, position_bits

MOST_VERSIONS = 200
BUDGET = 64 << 20
_BATCH = 128  # parts that are read in one call
_DECODED, _DECODED_BYTES = 12, 32 << 20  # versions that are decoded whole, and their bytes

_NUMBERED = re.compile(r"^(.*?(?:^|\.)[A-Za-z_]+\.\d+)\.(.+)$")


@dataclass(frozen=True, eq=False)
class Density:
    """Changes by tensor.

    Attributes:
        versions: those that were read.
        changed: float64[versions, tensors]. Of tensors that a part stores whole, their even share of the changes that
            the manifest counts.
        step: every how many versions one was read.
        failed: why others were not, and how many for each reason.
        differences: version -> bits of an ideal code for its differences, of a few versions that were decoded.
    """

    table: TensorTable
    versions: list[int]
    changed: np.ndarray
    step: int
    failed: dict[str, int]
    differences: dict[int, float]

    @cached_property
    def totals(self) -> np.ndarray:
        """float64[versions]: changed elements."""
        return np.asarray(self.changed.sum(axis=1))

    @cached_property
    def position_floor(self) -> np.ndarray:
        """float64[versions]: bits per change of an ideal code for the positions, tensor by tensor."""
        sizes = self.table.columns.numel
        bits = np.array([position_bits(sizes, np.minimum(row, sizes)).sum() for row in self.changed])
        return np.divide(bits, self.totals, out=np.full(len(bits), np.nan), where=self.totals > 0)

    def by(self, groups: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """(names, share): the changed share of each group of tensors, float64[groups, versions].

        Args:
            groups: the group of each tensor of the table. They keep the order of the table.
        """
        names = list(dict.fromkeys(groups))
        number = {name: at for at, name in enumerate(names)}
        of = np.array([number[group] for group in groups], np.int64)
        sizes = np.bincount(of, self.table.columns.numel, len(names))
        sums = np.stack(
            [np.bincount(of, row, len(names)).astype(np.float64) for row in self.changed] or [np.zeros(len(names))]
        )
        return names, (sums / np.maximum(sizes, 1)).T[:, : len(self.versions)]


def layer_of(name: str) -> str:
    """Group of a tensor by depth: `model.layers.3` for everything in it, else its own name."""
    match = _NUMBERED.match(name)
    return match[1] if match else name.removesuffix(".weight")


def kind_of(name: str) -> str:
    """Group of a tensor by what it is in its layer: `self_attn.q_proj`. Experts of one kind are one group."""
    match = _NUMBERED.match(name)
    rest = match[2] if match else name
    return re.sub(r"\.\d+(?=\.|$)", ".*", rest).removesuffix(".weight")


def read_density(bucket: Bucket, reader: ChainReader, deltas: Sequence[Manifest]) -> Density:
    """Of the deltas of a chain, oldest first."""
    table = reader.run().table
    found: dict[int, np.ndarray] = {}
    failed: dict[str, int] = {}
    step = _step(bucket, deltas)
    chosen = [delta for delta in deltas[::-1][::step][::-1] if delta.changed]
    left = BUDGET
    for batch in _batches(chosen):
        try:
            parts = _read(bucket, batch, left)
        except (HubsyncError, OSError) as error:
            failed[str(error)] = failed.get(str(error), 0) + len(batch)
            continue
        left -= sum(len(data) for data in parts.values())
        for delta in batch:
            try:
                found[delta.version] = _changed(table, delta, parts)
            except FormatError as error:
                failed[str(error)] = failed.get(str(error), 0) + 1
    changed = np.stack(list(found.values())) if found else np.zeros((0, len(table)))
    return Density(table, list(found), changed, step, failed, _differences(reader, chosen))


def _step(bucket: Bucket, deltas: Sequence[Manifest]) -> int:
    """Every how many versions one is read: as many as the newest allows to expect for the others."""
    if not deltas:
        return 1
    try:
        expected = sum(len(data) for data in _read(bucket, deltas[-1:], BUDGET).values())
    except (HubsyncError, OSError):  # told for each version later
        expected = 0
    expected = max(expected, 1)
    most = max(1, min(MOST_VERSIONS, BUDGET // (2 * expected)))
    return -(-len(deltas) // most)


def _batches(deltas: Sequence[Manifest]) -> Iterator[list[Manifest]]:
    batch: list[Manifest] = []
    for delta in deltas:
        if batch and sum(len(d.parts) for d in batch) + len(delta.parts) > _BATCH:
            yield batch
            batch = []
        batch.append(delta)
    if batch:
        yield batch


def _read(bucket: Bucket, deltas: Sequence[Manifest], most: int) -> dict[str, bytes]:
    """Name -> beginning of the parts of these deltas, `most` bytes and a batch at most. Missing ones are absent."""
    sizes = {Layout.part(delta, part): part.size for delta in deltas for part in delta.parts if part.size}
    parts = bucket.beginnings({path: min(FIRST_BYTES, size) for path, size in sizes.items()})
    more = {}
    for path, data in parts.items():
        try:
            wanted = wanted_bytes(data)
        except FormatError:
            continue  # told when its counts are read
        if len(data) < wanted <= sizes[path] and wanted <= most:
            more[path] = wanted
            most -= wanted
    return {**parts, **bucket.beginnings(more)} if more else parts


def _changed(table: TensorTable, delta: Manifest, parts: dict[str, bytes]) -> np.ndarray:
    """float64[tensors]. FormatError if a part is gone, unreadable or was not read."""
    changed, whole = np.zeros(len(table)), np.zeros(len(table), bool)
    for part in delta.parts:
        data = parts.get(Layout.part(delta, part))
        if data is None:
            raise FormatError("a part is gone")
        counts = read_counts(data, table)
        changed += counts.changed
        whole |= counts.whole
    rest = delta.changed - changed.sum()
    if whole.any() and rest > 0:
        sizes = table.columns.numel * whole
        changed += rest * sizes / max(1, sizes.sum())
    return np.minimum(changed, table.columns.numel)


def _differences(reader: ChainReader, deltas: Sequence[Manifest]) -> dict[int, float]:
    """Bits of the differences of a few versions, those that can be decoded without weights and are small enough."""
    fast = [delta for delta in deltas if delta.encoding is Encoding.FAST and not delta.absolute]
    chosen = fast[:: max(1, -(-len(fast) // _DECODED))]
    found, left = {}, _DECODED_BYTES
    for delta in chosen:
        if delta.nbytes > left:
            continue
        left -= delta.nbytes
        try:
            patch = reader.patch(delta)
        except (HubsyncError, OSError):
            continue  # it is missing in the picture, and `hubsync verify` says why
        diffs = [change.diffs.astype(np.int64) for change in patch.values() if isinstance(change, TensorDelta)]
        if diffs:
            found[delta.version] = difference_bits(np.concatenate(diffs))
    return found
