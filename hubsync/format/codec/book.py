"""Code books: the class map and the code parameters that all tensors of one dtype in a part share.

A book is one row of bytes. With one class it depends on nothing but the changes (the *fast* encoding). With 16 classes
(*compact*), the exponent of an element's old weight gives its class: the chance to change halves with every octave.

The compiled functions are the rules by which both `write` and `read` use a book.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hubsync.errors import FormatError
from hubsync.format.encoding import Encoding
from hubsync.kernels.classes import CLASSES, ClassMap
from hubsync.kernels.compiled import compiled

CLASSES_OF = {Encoding.FAST: 1, Encoding.COMPACT: CLASSES}

GAP, USUAL, TAIL, PLANES = range(4)  # columns of `Book.codes`; the planes are the last ones
MAX_PLANES = 5
MAX_K = 31
RICE = 128  # flag in TAIL: a Rice code, else Exp-Golomb
LIST_REST = 128  # flag in a plane: the changes that go on are listed, else those that end here
NO_PLANE = 255
FIELDS = 2  # columns of a chunk row behind the counts of the classes


@dataclass(frozen=True, eq=False)
class Book:
    """Code parameters.

    Attributes:
        low: exponent field of class 0; class = exponent - low, clipped to 0 .. classes - 1.
        orders: uint8[classes + FIELDS], Exp-Golomb orders of the columns of a chunk row.
        codes: uint8[classes, 3 + MAX_PLANES]: Rice parameter of the gaps; usual magnitude (1..255); parameter of the
            tail, the magnitudes that no plane ends; parameter of each plane.
    """

    low: int
    orders: np.ndarray
    codes: np.ndarray

    @property
    def classes(self) -> int:
        return len(self.codes)

    def class_map(self, dtype: str) -> ClassMap | None:
        """Classes of this dtype's elements; None if all are of class 0."""
        classes = ClassMap.of(dtype, self.low)
        return None if self.classes == 1 or self.low >= classes.mask else classes

    def pack(self) -> np.ndarray:
        """uint8[columns(classes)]"""
        return np.concatenate([np.array([self.low], np.uint8), self.orders, self.codes.reshape(-1)])

    @classmethod
    def unpack(cls, row: np.ndarray, classes: int) -> Book:
        """Inverse of `pack`; FormatError for parameters that no writer uses."""
        orders, codes = row[1 : 1 + classes + FIELDS], row[1 + classes + FIELDS :].reshape(classes, -1)
        planes = codes[:, PLANES:]
        ks = np.where(planes == NO_PLANE, 0, planes & ~np.uint8(LIST_REST))
        if max(orders.max(), codes[:, GAP].max(), (codes[:, TAIL] & ~np.uint8(RICE)).max(), ks.max()) > MAX_K:
            raise FormatError(f"code book: a parameter is above {MAX_K}")
        if codes[:, USUAL].min() == 0:
            raise FormatError("code book: a usual magnitude of 0")
        return cls(int(row[0]), orders, codes)


def columns(classes: int) -> int:
    """Bytes of a book."""
    return 1 + classes + FIELDS + (3 + MAX_PLANES) * classes


def one_class(classes: int, elements: int) -> np.ndarray:
    """int64[classes]: all elements in class 0."""
    counts = np.zeros(classes, np.int64)
    counts[0] = elements
    return counts


@compiled
def listed_count(count: int, size: int) -> int:
    """Number of listed elements of a class: the changed or the unchanged ones, whichever are fewer."""
    return min(count, size - count)


@compiled
def gap_k(k: int, shift: int, count: int, size: int) -> int:
    """The Rice parameter of a class in a chunk. The shift is for chunks with more or fewer changes than others."""
    if 2 * count > size:
        return int(k)
    return int(min(max(int(k) + shift, 0), MAX_K))


@compiled
def fold(magnitude: int, center: int) -> int:
    """Distance of a magnitude from the usual one: center -> 0, center + 1 -> 1, center - 1 -> 2, ..."""
    if magnitude >= 2 * center:
        return magnitude - 1
    return 2 * (magnitude - center) - 1 if magnitude > center else 2 * (center - magnitude)


@compiled
def unfold(value: int, center: int) -> int:
    """Inverse of `fold`."""
    if value > 2 * center - 2:
        return value + 1
    return center + ((value + 1) >> 1) if value & 1 else center - (value >> 1)
