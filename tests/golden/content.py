"""What the golden files are made from: weights, patches and documents, the same on every machine.

Numbers come from the raw output of PCG64, which numpy promises to keep; its distributions may change.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, reduce

import numpy as np
import torch

from tests.golden.names import (
    SIGNED,
    TORCH_DTYPES,
    Adapter,
    Base,
    Encoding,
    Head,
    Layout,
    Manifest,
    Part,
    Patch,
    Position,
    Run,
    SigningKey,
    TensorDelta,
    TensorSpec,
    TensorTable,
    TensorValues,
    Times,
    ViewBits,
    absolute,
    bits_of,
    changes_of,
    compose,
    digest_view,
    invert,
)

View = Mapping[str, torch.Tensor]

NOW = 1750000000.25  # seconds since 1970
NONCE = "0badcafe"
RUN_ID = "0123456789abcdef" * 2
KEY = SigningKey(bytes(range(32)))
CONFIG = '{"architectures": ["Golden"]}\n'

SHAPES = {"matrix": (40, 48), "experts": (3, 8, 32), "bias": (96,), "scale": (), "empty": (0, 4)}
TABLE = TensorTable(
    [TensorSpec(f"{dtype.lower()}.{name}", shape, dtype) for dtype in TORCH_DTYPES for name, shape in SHAPES.items()]
)
LARGE = TensorTable(  # cut into pieces of a row, into rows, and for compact parts into tiles: 4 or 2 a side
    [
        TensorSpec("long", (3, 1_200_000), "BF16"),
        TensorSpec("tall", (2090, 1000), "BF16"),
        TensorSpec("wide", (1024, 2048), "F8_E4M3"),
    ]
)
LORA = TensorTable(
    [
        TensorSpec("base_model.model.layer.lora_A.weight", (8, 48), "BF16"),
        TensorSpec("base_model.model.layer.lora_B.weight", (40, 8), "BF16"),
    ]
)


# --- weights and patches ------------------------------------------------------------------------------


def draws(what: str, count: int) -> np.ndarray:
    """uint64[count], another sequence for each text."""
    return np.random.PCG64(zlib.crc32(what.encode())).random_raw(count)


@cache
def view_of(table: TensorTable) -> View:
    """Bell-shaped weights of many octaves; each tensor begins with 0, -0, two NaNs and the least negative number."""
    tensors = {}
    for spec in table:
        terms = (draws(f"weights of {spec.name}", 4 * spec.numel) >> np.uint64(44)).astype(np.int64)
        numbers = (terms.reshape(4, -1).sum(0) - (2 << 20)).astype(np.float32) / np.float32(1 << 22)
        tensor = torch.from_numpy(numbers).to(TORCH_DTYPES[spec.dtype])
        sign = 1 << (spec.width - 1)
        if spec.numel > 8:
            bits_of(tensor)[:5] = [0, sign, 2 * sign - 1, sign - 1, sign + 1]
        tensors[spec.name] = tensor.reshape(spec.shape)
    return tensors


def advanced(table: TensorTable, view: View, patch: Patch) -> View:
    """The view with a patch applied."""
    tensors = {name: tensor.clone() for name, tensor in view.items()}
    for index, delta in patch.items():
        bits = bits_of(tensors[table[index].name])
        indices, _, after = changes_of(delta, bits)
        bits[indices] = after
    return tensors


def steps(raw: np.ndarray, width: int) -> np.ndarray:
    """Seven of eight are one step; the rest have a heavy tail. Half are negative."""
    tail = (raw >> np.uint64(16)) % (np.uint64(1) << (raw >> np.uint64(8)) % np.uint64(width - 2))
    magnitudes = 1 + np.where(raw % np.uint64(8) == 0, tail, np.uint64(0)).astype(np.int64)
    return np.where(raw >> np.uint64(63), -magnitudes, magnitudes).astype(SIGNED[width])


def nines(raw: np.ndarray, width: int) -> np.ndarray:
    """Magnitudes 8, 9 and 10, the first and the last as far as a step goes."""
    magnitudes = 8 + (raw % np.uint64(3)).astype(np.int64)
    diffs = np.where(raw >> np.uint64(63), -magnitudes, magnitudes).astype(SIGNED[width])
    diffs[[0, -1]] = np.iinfo(diffs.dtype).min, np.iinfo(diffs.dtype).max
    return diffs


def anything(raw: np.ndarray, width: int) -> np.ndarray:
    """Any difference but 0."""
    return np.maximum(raw % np.uint64(1 << width), np.uint64(1)).astype(f"u{width // 8}").view(SIGNED[width])


def delta_of(
    what: str, spec: TensorSpec, share: float | np.ndarray, diffs_of: Callable[[np.ndarray, int], np.ndarray] = steps
) -> TensorDelta:
    """About this share of the elements change: a number, or one for each element."""
    raw = draws(f"{what} of {spec.name}", 2 * spec.numel).reshape(2, -1)
    indices = np.flatnonzero((raw[0] >> np.uint64(32)) < np.asarray(share) * (1 << 32))
    return TensorDelta(indices, diffs_of(raw[1][indices], spec.width))


def patch_of(what: str, dtypes: tuple[str, ...] = tuple(TORCH_DTYPES)) -> Patch:
    """Changes of all tensors of some dtypes: few, more than half, or all of their elements."""
    patch = {}
    for index, spec in enumerate(TABLE):
        kind = spec.name.rpartition(".")[2]
        if spec.dtype not in dtypes or kind == "empty":
            continue
        share = {"matrix": 0.1, "experts": 0.05, "bias": 0.8, "scale": 1.0}[kind]
        patch[index] = delta_of(what, spec, share, nines if kind == "experts" else steps)
    return patch


def large_patch() -> Patch:
    """In each tensor one region changes much, one not at all, and the rest a little."""
    patch = {}
    for index, spec in enumerate(LARGE):
        share = np.full(spec.matrix, 0.0001)
        rows, cols = spec.matrix
        share[: rows // 3, : cols // 4] = 0.002
        share[rows // 2 :, cols // 2 :] = 0
        patch[index] = delta_of("chunks", spec, share.reshape(-1))
    return patch


def dense_patch() -> Patch:
    """Differences that cost more when they are coded than as they are."""
    return {
        index: delta_of("dense", spec, 1.0, anything)
        for index, spec in enumerate(TABLE)
        if spec.name.endswith("experts")
    }


def absolute_patch() -> Patch:
    """New values of one tensor of each dtype, changes of all others."""
    values = {
        index: TensorValues(draws(f"values of {spec.name}", spec.numel).astype(f"u{spec.width // 8}"))
        for index, spec in enumerate(TABLE)
        if spec.name.endswith("matrix")
    }
    return patch_of("absolute") | values


def in_a_row() -> list[Patch]:
    """Three patches that follow each other; the last undoes the first in one tensor."""
    first, second = patch_of("first"), patch_of("second")
    return [first, second, invert({0: first[0]})]


def split(patch: Patch) -> list[Patch]:
    """The shares of two ranks: every other change."""
    shares: list[Patch] = []
    for rank in range(2):
        cut = {index: TensorDelta(delta.indices[rank::2], delta.diffs[rank::2]) for index, delta in patch.items()}
        shares.append({index: delta for index, delta in cut.items() if len(delta)})
    return shares


# --- delta parts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GoldenPart:
    """A delta part of `parts/`.

    Attributes:
        name: of the file, without its ending.
        make: gives the patch.
        versions: from which to which it leads.
    """

    name: str
    make: Callable[[], Patch]
    table: TensorTable = TABLE
    compact: bool = False
    versions: tuple[int, int] = (6, 7)
    rank: int = 0

    @property
    def path(self) -> str:
        return f"parts/{self.name}.safetensors"

    @cached_property
    def patch(self) -> Patch:
        return self.make()

    @property
    def old(self) -> ViewBits | None:
        return ViewBits(self.table, view_of(self.table)) if self.compact else None

    @cached_property
    def parent(self) -> Position:
        return Position(self.versions[0], digest_view(self.table, view_of(self.table)).hex)

    @cached_property
    def position(self) -> Position:
        after = advanced(self.table, view_of(self.table), self.patch)
        return Position(self.versions[1], digest_view(self.table, after).hex)

    @property
    def manifest(self) -> Manifest:
        """One that the part belongs to."""
        encoding = Encoding.COMPACT if self.compact else Encoding.FAST
        known = replace(DELTA, table_hash=self.table.hash, position=self.position, parent=self.parent)
        return replace(known, encoding=encoding, absolute=absolute(self.patch))


def _both(name: str, make: Callable[[], Patch], table: TensorTable = TABLE) -> list[GoldenPart]:
    return [GoldenPart(f"{name}-fast", make, table), GoldenPart(f"{name}-compact", make, table, compact=True)]


def _of_dtype(dtype: str) -> list[GoldenPart]:
    return _both(dtype.lower(), lambda: patch_of("patch", (dtype,)))


PARTS = [
    *[part for dtype in TORCH_DTYPES for part in _of_dtype(dtype)],
    *_both("chunks", large_patch, LARGE),
    *_both("dense", dense_patch),
    *_both("absolute", absolute_patch),
    GoldenPart("merged-fast", lambda: reduce(compose, in_a_row()), versions=(4, 7)),
    GoldenPart("empty-fast", dict, rank=3),
]


# --- documents ----------------------------------------------------------------------------------------

EPOCH = f"00000001-{NONCE}"
_A, _B, _SHA = "a" * 32, "b" * 32, "c" * 64

DELTA = Manifest(
    kind="delta",
    run_id=RUN_ID,
    table_hash=TABLE.hash,
    epoch=EPOCH,
    position=Position(7, _B),
    parent=Position(6, _A),
    parent_epoch=EPOCH,
    parts=(Part(1000, _SHA), Part(7, "d" * 64, rank=1)),
    changed=12,
    created=NOW,
)
SAVED = replace(DELTA, step=40, name="Größe 1/4", encoding=Encoding.COMPACT, serve=5, expires=NOW + 3600)
REWRITTEN = replace(DELTA, absolute=3, times=Times((NOW, NOW + 0.5), (NOW + 0.5, NOW + 0.75), (NOW + 0.75, NOW + 2)))
FIRST = replace(DELTA, position=Position(1, _A), parent=Position(0, _B), parent_epoch=None, created=0.0)
MERGED = replace(DELTA, kind="merged", epoch=f"compact-{NONCE}", parent=Position(4, _A), parts=DELTA.parts[:1], step=40)
ANCHOR = replace(
    DELTA,
    kind="anchor",
    parent=None,
    parent_epoch=None,
    parts=(Part(30, _SHA, file="config.json"), Part(1 << 33, _SHA, file="model.safetensors")),
    changed=0,
    encoding=Encoding.DENSE,
)
RUN = Run(RUN_ID, TABLE, _B, Base("org/model", "5" * 40), created=NOW)
ADAPTER = Adapter(
    config={"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["layer"], "lora_dropout": 0.0},
    base=Base("org/model", "5" * 40),
    base_digest=_A,
)

DOCUMENTS: dict[str, Run | Manifest | Head] = {
    "run.json": RUN,
    "run-bare.json": Run(RUN_ID, TABLE, _B),
    "run-adapter.json": Run(RUN_ID, LORA, _B, created=NOW, adapter=ADAPTER),
    "delta.json": DELTA,
    "delta-saved.json": SAVED,
    "delta-first.json": FIRST,
    "delta-rewritten.json": REWRITTEN,
    "merged.json": MERGED,
    "anchor.json": ANCHOR,
    "head.json": Head(DELTA, serve=7, written=NOW),
    "head-of-anchor.json": Head(ANCHOR, serve=5, written=NOW),
}
SIGNED_DOCUMENTS: dict[str, Run | Manifest | Head] = {
    Layout.RUN: replace(RUN, public_key=KEY.public.hex),
    Layout.HEAD: DOCUMENTS["head.json"],
    **{Layout.manifest(manifest): manifest for manifest in (SAVED, MERGED, ANCHOR)},
}


# --- runs ---------------------------------------------------------------------------------------------


@cache
def run_patches() -> list[Patch]:
    """Those of versions 1 to 4."""
    return [*in_a_row(), patch_of("last")]


@cache
def run_views() -> list[View]:
    """Those of versions 0 to 4."""
    views = [view_of(TABLE)]
    for patch in run_patches():
        views.append(advanced(TABLE, views[-1], patch))
    return views


def run() -> Run:
    """The run of `run/`: version 0 is nowhere but in the bucket."""
    digest = digest_view(TABLE, view_of(TABLE)).hex
    return Run(RUN_ID, TABLE, digest, created=NOW, public_key=KEY.public.hex)


def adapter_run() -> Run:
    """The run of `adapter/`."""
    return Run(RUN_ID, LORA, digest_view(LORA, view_of(LORA)).hex, created=NOW, adapter=ADAPTER)


@cache
def adapter_patch() -> Patch:
    return {index: delta_of("adapter", spec, 0.5) for index, spec in enumerate(LORA)}
