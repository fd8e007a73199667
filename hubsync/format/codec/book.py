"""Code books: the class map and the code parameters that all tensors of one dtype in a file share.

A book is one row of bytes. With one class nothing needs to be known of the old weights (the *fast* level); with 16,
elements are told apart by the exponent that they had (*compact*): the chance to change halves with every octave.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hubsync.errors import FormatError
from hubsync.format.encoding import Encoding
from hubsync.kernels.classes import CLASSES, ClassMap

GAP, USUAL, TAIL, PLANES = range(4)  # columns of `Book.codes`; the planes are the last ones
MAX_PLANES = 5
MAX_K = 31
RICE = 128  # flag in TAIL: a Rice code, else Exp-Golomb
LIST_REST = 128  # flag in a plane: those that go on are listed, else those that end here
NO_PLANE = 255
FIELDS = 2  # columns of a chunk row behind the counts of the classes


@dataclass(frozen=True, eq=False)
class Book:
    """Attributes:
    low: exponent field of class 0; class = exponent - low, clipped to 0 .. classes - 1.
    orders: uint8[classes + FIELDS], Exp-Golomb orders of the columns of a chunk row.
    codes: uint8[classes, 3 + MAX_PLANES]: Rice parameter of the gaps, the usual magnitude (1..255), parameter of the
        magnitudes that no plane ends, and of each plane.
    """

    low: int
    orders: np.ndarray
    codes: np.ndarray

    @property
    def classes(self) -> int:
        return len(self.codes)

    def class_map(self, dtype: str) -> ClassMap | None:
        """How to tell the classes of this dtype's elements apart; None where all are of class 0."""
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


def one_class(classes: int, elements: int) -> np.ndarray:
    """int64[classes]: all elements in class 0."""
    counts = np.zeros(classes, np.int64)
    counts[0] = elements
    return counts


def columns(classes: int) -> int:
    """Bytes of a book."""
    return 1 + classes + FIELDS + (3 + MAX_PLANES) * classes


CLASSES_OF = {Encoding.FAST: 1, Encoding.COMPACT: CLASSES}
