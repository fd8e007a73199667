"""Compiling the kernels of steps and publishes before the first one needs them."""

from __future__ import annotations

import logging
import threading

import torch

from hubsync.format.codec.encode import prepare
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.bits import dtype_code
from hubsync.kernels.gpu.adamw import gives_torchs_bits
from hubsync.kernels.gpu.listing import ChangeList

from .device_live import DeviceLive

logger = logging.getLogger(__name__)

_ELEMENTS = 5000


def compile_in_background(
    device: torch.device, live: torch.dtype, published: torch.dtype, *, fused: bool, holds_old: bool = False
) -> None:
    """Run all passes on a small tensor, in a thread. What is compiled stays in Triton's cache on the disk too."""
    if device.type == "cuda":
        threading.Thread(
            target=_compile, args=(device, live, published, fused, holds_old), name="hubsync-compile", daemon=True
        ).start()


def _compile(device: torch.device, live: torch.dtype, published: torch.dtype, fused: bool, holds_old: bool) -> None:
    try:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            _run(torch.randn(_ELEMENTS, device=device).to(live), published)
            if fused:
                gives_torchs_bits(device)
            if holds_old:
                prepare(device, by_class=True)
    except Exception as error:  # training and publishing will tell, if it matters
        logger.info("could not compile in advance: %r", error)


def _run(tensor: torch.Tensor, published: torch.dtype) -> None:
    """One step and one publish."""
    table = TensorTable([TensorSpec("warm-up", (_ELEMENTS,), dtype_code(published))])
    live = DeviceLive(table, [tensor], [0])
    changes, ranges = ChangeList(live.numbering), [(0, live.numbering.tiles)]
    changes.begin()
    old = changes.save(ranges)
    tensor[::100] *= 1.25
    changes.compare(ranges, old)
    changes.end()
    with live.readable():
        found, _, _ = live.proved(changes.collect)
    assert found.changed
    prepare(tensor.device)
