"""The arithmetic of `benchmarks.quantised`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from benchmarks.quantised import BLOCK, measure, quantise
from benchmarks.snapshots import synthetic_pair
from hubsync.format.encoding import Encoding


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_quantises_as_transformers_saves_fp8_checkpoints(scale_fmt: str) -> None:
    weight = (torch.randn(2 * BLOCK, 3 * BLOCK) * 0.02).bfloat16()
    weight[:BLOCK, :BLOCK] = 0
    settings = SimpleNamespace(weight_block_size=(BLOCK, BLOCK), scale_fmt=scale_fmt)
    theirs = Fp8Quantize(SimpleNamespace(quantization_config=settings)).convert({"a.weight": weight})

    codes, scales = quantise(weight, power_of_two=scale_fmt == "ue8m0")

    assert torch.equal(codes.view(torch.uint8), theirs["a.weight"].view(torch.uint8))
    assert torch.equal(scales, theirs["a.weight_scale_inv"].float())


def test_codes_change_less_often_than_bf16_elements_unless_scales_move() -> None:
    pair = synthetic_pair(layers=1, width=256, update=3e-5)
    bf16, fp8, powers = measure(pair, Encoding.FAST)

    assert 0 < fp8.by_scale < fp8.changed < bf16.changed
    assert powers.scales < fp8.scales
    assert fp8.bytes < bf16.bytes
