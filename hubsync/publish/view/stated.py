"""What is known of a view before it is made: dtypes and shapes that a base checkpoint, or the run, has.

Servers load a base checkpoint, so a view has its layouts, and its dtypes where they are not those of most tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from hubsync.format.checkpoint import Specs, kept_dtypes
from hubsync.format.table import WIDTHS

_SHOWN = 3


@dataclass(frozen=True)
class Stated:
    """What a base checkpoint or a run states of its tensors, by name.

    Attributes:
        shapes: of all of its tensors.
        kept: safetensors dtype codes of the tensors that a view does not cast to its own dtype.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)


def stated_by(base: Specs, model: object, tensors: Mapping[str, torch.Tensor]) -> Stated:
    """What a view of a model takes over from its base checkpoint.

    A tensor that the model holds in a narrower dtype than the checkpoint has the dtype of the view: to publish it in
    float32 would give servers of the base checkpoint other values.

    Args:
        base: tensors of the base checkpoint; empty if it is not on this machine.
        model: the model, or its class: transformers names modules that are float32 in any model of a class.
        tensors: the published tensors, as the model holds them.
    """
    modules = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    patterns = [re.compile(rf"(^|\.){module}(\.|$)") for module in modules]  # as transformers does
    strict = {name: "F32" for name in tensors if any(pattern.search(name) for pattern in patterns)}
    kept = {
        name: code
        for name, code in (kept_dtypes(base) | strict).items()
        if name in tensors and 8 * tensors[name].element_size() >= WIDTHS[code]
    }
    return Stated({name: shape for name, (shape, _) in base.items()}, kept)


def differences(base: Specs, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Names and shapes in which a view is not the base checkpoint, as a text; None if there are none.

    Tensors that only the base has do not count: transformers does not load all of them.
    """
    found = [f"{name} is not in it" for name in shapes if name not in base]
    found += [
        f"{name} has shape {list(base[name][0])} in it, and {list(shape)} in the model"
        for name, shape in shapes.items()
        if name in base and base[name][0] != shape
    ]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more if found else None
