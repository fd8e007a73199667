"""Lower bounds for the size of a delta: the length of an ideal code for its positions and its differences.

Positions: the adaptive code of Krichevsky and Trofimov of the changed elements of each tensor. Differences of ordered
integers: their entropy, half a logarithm for each distinct value, and 16 bits more for those beyond +-300. A model of
the weights' history could go lower; these bounds use none.
"""

from __future__ import annotations

from math import log

import numpy as np
import torch

_RARE = 300


def position_bits(sizes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """float64: bits for which `counts` elements (int64) of groups of `sizes` changed, each group by itself."""

    def log_beta(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)

    half = torch.tensor(0.5, dtype=torch.float64)
    changed, same = (torch.from_numpy(np.asarray(n, np.float64)) for n in (counts, np.subtract(sizes, counts)))
    return np.asarray((log_beta(half, half) - log_beta(changed + half, same + half)).numpy() / log(2))


def difference_bits(diffs: np.ndarray) -> float:
    """Bits for signed differences (integers), all together."""
    counts = np.bincount(np.clip(diffs, -_RARE, _RARE) + _RARE)
    counts = counts[counts > 0]
    entropy = -float((counts * np.log2(counts / counts.sum())).sum())
    learning = 0.5 * np.log2(max(2, len(diffs))) * (len(counts) - 1)
    return entropy + float(learning) + 16.0 * int((np.abs(diffs) >= _RARE).sum())
