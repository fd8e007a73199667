"""The tensor table: names, shapes and dtypes of the published view, in order.

`run.json` fixes the table of a run. Deltas name tensors by their *index* in it, so a hostile part cannot introduce a
name. Two sides with the same table hash agree on every coordinate: (tensor index, flat row-major element index).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, overload

from hubsync.errors import FormatError

if TYPE_CHECKING:
    import numpy as np

# safetensors dtype code -> bits per element. Elements are bit patterns of this width, never numbers.
WIDTHS = {"BF16": 16, "F16": 16, "F32": 32, "F8_E4M3": 8, "F8_E5M2": 8}
DTYPES = tuple(WIDTHS)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,511}")
MAX_TENSORS = 1 << 20
MAX_NUMEL = 1 << 40


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the published view, in checkpoint (Hugging Face) coordinates.

    Attributes:
        name: checkpoint name, for example `model.layers.0.mlp.up_proj.weight`.
        shape: checkpoint shape; `()` is a scalar.
        dtype: safetensors code of the served dtype, one of `WIDTHS`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bits per element: 8, 16 or 32."""
        return WIDTHS[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.numel * self.width // 8

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the tensor as a matrix: first dimension by the product of the rest; 1-D is one row."""
        if len(self.shape) < 2:
            return 1, self.numel
        return self.shape[0], math.prod(self.shape[1:])


class Columns(NamedTuple):
    """A tensor table as int64 arrays of one entry for each tensor.

    Attributes:
        rows, cols: `TensorSpec.matrix`.
        dtype: number in `DTYPES`.
    """

    rows: np.ndarray
    cols: np.ndarray
    numel: np.ndarray
    width: np.ndarray
    nbytes: np.ndarray
    dtype: np.ndarray


class TensorTable(Sequence[TensorSpec]):
    """An ordered, hashable list of `TensorSpec`s with unique names. FormatError for an invalid one."""

    def __init__(self, specs: Sequence[TensorSpec]):
        self._specs = tuple(specs)
        self._index = {spec.name: i for i, spec in enumerate(self._specs)}
        if len(self._index) != len(self._specs):
            raise FormatError("tensor table: a tensor name occurs twice")
        if len(self._specs) > MAX_TENSORS:
            raise FormatError(f"tensor table: more than {MAX_TENSORS} tensors")
        for spec in self._specs:
            _check(spec)

    def __len__(self) -> int:
        return len(self._specs)

    @overload
    def __getitem__(self, index: int) -> TensorSpec: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TensorSpec]: ...
    def __getitem__(self, index: int | slice) -> TensorSpec | Sequence[TensorSpec]:
        return self._specs[index]

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self._specs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorTable) and self._specs == other._specs

    def __hash__(self) -> int:
        return hash(self._specs)

    def index_of(self, name: str) -> int:
        """Index of `name`; KeyError if the table has no such tensor."""
        return self._index[name]

    def __contains__(self, name: object) -> bool:
        return name in self._index

    @property
    def numel(self) -> int:
        return sum(spec.numel for spec in self._specs)

    @property
    def nbytes(self) -> int:
        """Bytes of one dense published view."""
        return sum(spec.nbytes for spec in self._specs)

    def to_json(self) -> list[list]:
        """JSON form: `[[name, [shape...], dtype], ...]`, in order."""
        return [[spec.name, list(spec.shape), spec.dtype] for spec in self._specs]

    @classmethod
    def from_json(cls, rows: object) -> TensorTable:
        """Parse and validate the JSON form; FormatError on anything unexpected."""
        if not isinstance(rows, list):
            raise FormatError("tensor table: expected a list")
        specs = []
        for row in rows:
            if not (isinstance(row, list) and len(row) == 3 and isinstance(row[0], str) and isinstance(row[1], list)):
                raise FormatError("tensor table: each row must be [name, shape, dtype]")
            if not all(type(size) is int for size in row[1]) or not isinstance(row[2], str):
                raise FormatError(f"tensor table: bad shape or dtype for {row[0]!r}")
            specs.append(TensorSpec(row[0], tuple(row[1]), row[2]))
        return cls(specs)

    @cached_property
    def columns(self) -> Columns:
        """The table as arrays: a model may have 20,000 tensors, too many for Python code at every step."""
        import numpy as np  # here: `hubsync --help` reads this module

        rows, cols = np.array([spec.matrix for spec in self], np.int64).reshape(-1, 2).T
        width = np.array([spec.width for spec in self], np.int64)
        dtype = np.array([DTYPES.index(spec.dtype) for spec in self], np.int64)
        return Columns(rows, cols, rows * cols, width, rows * cols * width // 8, dtype)

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON form. Equal hashes mean equal coordinates."""
        canonical = json.dumps(self.to_json(), separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def _check(spec: TensorSpec) -> None:
    if not _NAME.fullmatch(spec.name) or ".." in spec.name:
        raise FormatError(f"tensor table: illegal tensor name {spec.name!r}")
    if spec.dtype not in WIDTHS:
        raise FormatError(f"tensor table: {spec.name} has dtype {spec.dtype!r}; supported are {', '.join(WIDTHS)}")
    if len(spec.shape) > 8 or not all(0 <= size <= MAX_NUMEL for size in spec.shape) or spec.numel > MAX_NUMEL:
        raise FormatError(f"tensor table: {spec.name} has an impossible shape {list(spec.shape)}")
