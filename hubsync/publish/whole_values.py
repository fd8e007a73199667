"""New values of tensors whose changes one rank does not know, while several ranks own parts of them.

An absolute record holds a whole tensor. So the ranks send their parts of such a tensor to one of them, which publishes
it. This is rare: a copy that changes are detected against was written to, by a bit that flipped or by other code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from hubsync.kernels.bits import bits_of
from hubsync.publish.detect.base import Detector, PartHolder
from hubsync.publish.detect.changes import Change, Detected
from hubsync.publish.view.division import assembled
from hubsync.publish.view.shards import Shard

from .ranks import Ranks


def with_whole_values(
    ranks: Ranks, division: Sequence[Sequence[Shard]], detector: Detector, detected: Detected, indices: Iterable[int]
) -> Detected:
    """What this rank has detected, with new values instead of changes of some tensors. Rounds of `ranks`.

    Args:
        division: rank -> the elements of each tensor that it owns.
        detector: holds this rank's parts.
        indices: of the tensors, those of all ranks.
    """
    assert isinstance(detector, PartHolder), "several ranks each hold their part"
    changes, values, whole, on_device = dict(detected.changes), dict(detected.values), {}, detected.on_device
    for number, index in enumerate(sorted(indices)):
        if index not in values:
            listed = None if on_device is None else on_device.change_of(index)
            values[index] = _after(detector.part(index), listed or changes.pop(index, None))
        found = assembled(ranks, division, index, torch.from_numpy(values[index]), number % ranks.size)
        if found is not None:
            whole[index] = found.numpy()
    on_device = None if on_device is None else on_device.without(values)
    return replace(detected, changes=changes, values=values, whole=whole, on_device=on_device)


def _after(copy: torch.Tensor, change: Change | None) -> np.ndarray:
    """Bit patterns of a part after a change."""
    patterns = bits_of(copy.cpu()).copy()
    if change is not None:
        patterns[change.indices] = change.new
    return patterns
