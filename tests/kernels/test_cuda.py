"""The same promises for weights on a GPU. Skipped without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.chain.replay import replay
from hubsync.format.digest import digest_at, digest_range, digest_torch
from hubsync.publish.detect.choose import choose_detector
from hubsync.publish.view.live import table_of
from hubsync.publish.view.strided import Place, StridedView
from tests.support.tiny import Tiny, same_bits, view_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("width", [8, 16, 32])
def test_a_digest_does_not_depend_on_the_device(width: int) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << width, 3_000_001, dtype=np.uint64).astype(f"u{width // 8}")
    tensor = torch.from_numpy(bits.view(f"i{width // 8}") if width > 8 else bits).cuda()
    indices = torch.randperm(1 << 20)[: len(bits) // 3].sort().values
    assert digest_torch(7, tensor, 5) == digest_range(7, bits, 5)
    assert digest_torch(7, tensor[: len(indices)], indices=indices.cuda()) == digest_at(
        7, indices.numpy(), bits[: len(indices)]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("snapshot_device", ["model", "cpu"])
@pytest.mark.parametrize("encoding", ["fast", "compact"])
def test_training_on_a_gpu_is_replayed_bit_for_bit(
    tmp_path: Path, encoding: str, snapshot_device: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = Tiny(64, dtype).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    config = SyncConfig(bucket=str(tmp_path / "bucket"), snapshot_device=snapshot_device, encoding=encoding)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        for _ in range(5):
            tokens = torch.randint(0, 11, (2, 5), device="cuda")
            torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            published = engine.publish().result()
    reader = ChainReader(LocalBucket(tmp_path / "bucket"), tmp_path / "cache")
    view = replay(reader, reader.plan(None))
    assert view.position == published.position
    assert same_bits(view.tensors, {name: tensor.cpu() for name, tensor in view_of(model).items()})


@pytest.mark.parametrize("detector", ["snapshot", "sliced"])
def test_parts_of_a_fused_parameter_are_compared_in_place(detector: str) -> None:
    experts = torch.nn.Parameter(torch.randn(5, 12, 70, device="cuda"))
    live: dict[str, torch.Tensor] = {
        f"{expert}.{name}": StridedView(f"{expert}.{name}", experts, Place((6, 70), (70, 1), 840 * expert + 420 * half))
        for expert in range(5)
        for half, name in enumerate(("gate", "up"))
    }
    optimizer = torch.optim.AdamW([experts], lr=1e-3)
    config = SyncConfig(bucket="nowhere", detector=detector)
    looking = choose_detector(live, table_of(live, torch.bfloat16), optimizer, config)
    for _ in range(2):
        before = experts.detach().bfloat16().cpu().view(torch.int16)
        experts.grad = torch.randn_like(experts) * (torch.rand_like(experts) < 0.01)
        optimizer.step()
        detected = looking.detect()
        looking.advance(detected)
        moved = experts.detach().bfloat16().cpu().view(torch.int16) != before
        expected = {
            index: part.flatten().nonzero().flatten().tolist() for index, part in enumerate(moved.view(10, 420))
        }
        assert {index: change.indices.tolist() for index, change in detected.patch.items()} == {
            index: at for index, at in expected.items() if at
        }
    looking.close()
