"""Code books: the class map and the code parameters that all tensors of one dtype in a file share.

A book is one row of bytes. With one class nothing needs to be known of the old weights (the *fast* level); with 16,
elements are told apart by the exponent that they had (*compact*): the chance to change halves with every octave.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hubsync.errors import FormatError
from hubsync.kernels.classes import CLASSES, ClassMap

LISTED, EXP_GOLOMB, RICE = range(3)  # how the magnitudes of a class are coded
GAP, MODE, CENTER, MAGNITUDE = range(4)  # columns of `Book.codes`
MAX_K = 31
FIELDS = 4  # columns of a chunk row behind the counts of the classes


@dataclass(frozen=True, eq=False)
class Book:
    """Attributes:
    low: exponent field of class 0; class = exponent - low, clipped to 0 .. classes - 1.
    k_listed: Rice parameter of the gaps between listed exceptions.
    orders: uint8[classes + FIELDS], Exp-Golomb orders of the columns of a chunk row.
    codes: uint8[classes, 4]: Rice parameter of the gaps, how magnitudes are coded, the usual magnitude (1..255), and
        the parameter of the magnitudes.
    """

    low: int
    k_listed: int
    orders: np.ndarray
    codes: np.ndarray

    @property
    def classes(self) -> int:
        return len(self.codes)

    def class_map(self, dtype: str) -> ClassMap | None:
        """How to tell the classes of this dtype's elements apart; None where there is one."""
        return None if self.classes == 1 else ClassMap.of(dtype, self.low)

    def pack(self) -> np.ndarray:
        """uint8[columns(classes)]"""
        head = np.array([self.low, self.k_listed], np.uint8)
        return np.concatenate([head, self.orders, self.codes.reshape(-1)])

    @classmethod
    def unpack(cls, row: np.ndarray, classes: int) -> Book:
        """Inverse of `pack`; FormatError for parameters that no writer uses."""
        orders, codes = row[2 : 2 + classes + FIELDS], row[2 + classes + FIELDS :].reshape(classes, 4)
        if row[1] > MAX_K or orders.max() > MAX_K or codes[:, [GAP, MAGNITUDE]].max() > MAX_K:
            raise FormatError(f"code book: a parameter is above {MAX_K}")
        if codes[:, MODE].max() > RICE or codes[:, CENTER].min() == 0:
            raise FormatError("code book: an unknown code, or a usual magnitude of 0")
        return cls(int(row[0]), int(row[1]), orders, codes)


def columns(classes: int) -> int:
    """Bytes of a book."""
    return 2 + classes + FIELDS + 4 * classes


CLASSES_OF = {"fast": 1, "compact": CLASSES}  # the levels
