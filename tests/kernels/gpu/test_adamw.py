"""torch's fused AdamW with the comparison in it, on a GPU if there is one, else in Triton's interpreter.

The interpreter does not round every operation as a GPU does, so its updates are only near those of torch.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.on_gpu import DEVICE, INTERPRETED, in_the_interpreter, on_device

test_in_tritons_interpreter = in_the_interpreter(__file__)
pytestmark = on_device


@pytest.mark.skipif(INTERPRETED, reason="the interpreter computes otherwise")
def test_this_torch_computes_as_the_kernel_does() -> None:
    from hubsync.kernels.gpu.adamw import gives_torchs_bits

    assert gives_torchs_bits(torch.device(DEVICE))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_update_changes_parameters_and_moments_and_marks_what_changed(decay: float) -> None:
    from hubsync.kernels.gpu.adamw import AdamW, Options
    from hubsync.kernels.gpu.listing import ChangeList
    from hubsync.kernels.gpu.numbering import TO_BF16, Numbering

    rng = torch.Generator().manual_seed(0)

    def randoms() -> list[torch.Tensor]:
        return [torch.randn(size, generator=rng).to(DEVICE) * 0.02 for size in (700, 3, 256)]

    params, grads, means = randoms(), randoms(), randoms()
    squares = [tensor.square() for tensor in randoms()]
    ours = [[tensor.clone() for tensor in column] for column in (params, means, squares)]
    before = [tensor.bfloat16().view(torch.int16).cpu().numpy() for tensor in params]
    steps = [torch.full((), float(t + 1), device=DEVICE) for t in range(3)]
    options = Options(1e-4, 0.9, 0.99, decay, 1e-8)
    torch._fused_adamw_(
        params, grads, means, squares, [], steps, amsgrad=False, lr=options.lr, beta1=options.beta1,
        beta2=options.beta2, weight_decay=decay, eps=options.eps, maximize=False,
    )  # fmt: skip
    numbering = Numbering(ours[0], [TO_BF16] * 3, 256)
    changes = ChangeList(numbering)
    ranges = [(0, 2), (2, numbering.tiles)]
    old, marks = changes.room(ranges)
    AdamW(numbering, [0, 1, 2], (grads, ours[1], ours[2]), steps, options).update(ranges, old, marks)
    changes.append(ranges, old, marks)
    for mine, theirs in zip(ours, (params, means, squares), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-9) if INTERPRETED else torch.equal(a, b)
    now = [tensor.bfloat16().view(torch.int16).cpu().numpy() for tensor in ours[0]]
    at = [np.flatnonzero(a != b) for a, b in zip(before, now, strict=True)]
    listed = changes.collect()
    assert listed.numbers.tolist() == [int(numbering.first[t]) + i for t in range(3) for i in at[t].tolist()]
    assert listed.old.tolist() == [int(a[i]) for a, own in zip(before, at, strict=True) for i in own]
