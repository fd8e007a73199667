"""Classes of elements by the exponent of their pattern: 16, one per octave, clipped at both ends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CLASSES = 16

# safetensors dtype code -> (bits of the mantissa, bits of the exponent)
_FIELDS = {"BF16": (7, 8), "F16": (10, 5), "F32": (23, 8), "F8_E4M3": (3, 4), "F8_E5M2": (2, 5)}


@dataclass(frozen=True, eq=False)
class ClassMap:
    """class = clip(exponent - low, 0, CLASSES - 1), exponent = pattern >> shift & mask.

    Attributes:
        table: uint8[256], exponent -> class.
        ones: uint64[256], exponent -> a one in nibble `class`: adding up to 15 of these counts 16 classes at once.
    """

    low: int
    shift: int
    mask: int
    table: np.ndarray
    ones: np.ndarray

    @staticmethod
    @lru_cache(64)
    def of(dtype: str, low: int) -> ClassMap:
        mantissa, exponent = _FIELDS[dtype]
        table = np.clip(np.arange(256) - low, 0, CLASSES - 1).astype(np.uint8)
        ones = np.uint64(1) << (table.astype(np.uint64) * np.uint64(4))
        return ClassMap(low, mantissa, (1 << exponent) - 1, table, ones)

    def exponents(self, bits: np.ndarray) -> np.ndarray:
        """Exponent fields of patterns."""
        return bits >> bits.dtype.type(self.shift) & bits.dtype.type(self.mask)
