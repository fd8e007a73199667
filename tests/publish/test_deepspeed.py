"""DeepSpeed ZeRO: optimizer states, gradients and parameters are partitioned over ranks, and nothing is gathered.

DeepSpeed itself runs here, on CPUs over gloo. `make test-extras` installs it and runs these tests, and those of TRL
under `accelerate launch` in test_accelerate.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.chain.replay import View, replay
from hubsync.errors import ConfigError
from hubsync.publish.results import Published
from hubsync.publish.view.live import published_tensors
from tests.publish.test_experts import qwen
from tests.support.tiny import same_bits
from tests.support.training import run, watched

pytestmark = pytest.mark.extras

STEPS = 3


def policy() -> Any:
    """A small mixture of experts whose sizes ranks do not divide evenly; its parameters are longer than messages."""
    return qwen(67)


def initialize(stage: int, make: Callable[[], Any] = policy, bf16: bool = False, **zero: Any) -> tuple[Any, Any]:
    """DeepSpeed's engine and optimizer of a model."""
    import deepspeed

    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())  # as a launcher sets it
    model = make()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, optimizer


def train(engine: Any, seed: int) -> None:
    torch.manual_seed(100 * seed + torch.distributed.get_rank())
    tokens = torch.randint(0, 64, (2, 6))
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()


def saved(engine: Any) -> dict[str, torch.Tensor]:
    """The published view as transformers writes it, from parameters gathered by DeepSpeed. A collective."""
    import deepspeed
    from transformers.core_model_loading import revert_weight_conversion

    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        whole = {name: parameter.detach().bfloat16() for name, parameter in parameters.items()}
        return {name: tensor.clone() for name, tensor in revert_weight_conversion(engine.module, whole).items()}


def publishes(
    rank: int, address: str, stage: int, zero: dict[str, Any]
) -> tuple[list[Published], dict[str, torch.Tensor], int]:
    engine, optimizer = initialize(stage, **zero)
    versions = []
    with DeltaWeightTransferEngine(engine, optimizer, SyncConfig(bucket=address)) as sync:
        for number in range(1, STEPS + 1):
            train(engine, number)
            with watched() as watch:
                versions.append(sync.publish().result())
        assert sync.steps == STEPS, "steps of the optimizer inside DeepSpeed's"
        sync.anchor()
    return versions, saved(engine), watch.largest


def follow(address: Path, tmp_path: Path) -> View:
    reader = ChainReader(LocalBucket(str(address)), tmp_path / "cache")
    return replay(reader, reader.plan(None))


@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        (1, {}),
        (2, {}),
        (3, {}),
        (3, {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}),
        (3, {"bf16": True}),
    ],
)
def test_a_replica_ends_with_the_trained_weights(stage: int, zero: dict[str, Any], tmp_path: Path) -> None:
    results = run(3, publishes, tmp_path / "run", stage, zero)
    versions, trained, _ = results[0]
    view = follow(tmp_path / "run", tmp_path)
    assert view.position == versions[-1].position
    assert [version.version for version in versions] == [1, 2, 3]
    assert same_bits(view.tensors, trained)
    for version in versions:
        assert all(share.changed for share in version.ranks), "each rank publishes its part"
    if stage == 3:
        fused = max(parameter.numel() for parameter in policy().parameters())
        assert all(largest < fused for *_, largest in results), "no rank assembled a parameter"


def joins(rank: int, address: str) -> int:
    engine, optimizer = initialize(3)
    with DeltaWeightTransferEngine(engine, optimizer, SyncConfig(bucket=address)) as sync:
        return sync.position.version


def test_a_run_is_resumed_without_deepspeed_and_with_it_again(tmp_path: Path) -> None:
    """The same weights, partitioned or not, have the same digest."""
    assert run(2, joins, tmp_path / "run") == [0, 0]
    with DeltaWeightTransferEngine(policy(), None, SyncConfig(bucket=str(tmp_path / "run"))) as alone:
        assert alone.position.version == 0
    assert run(3, joins, tmp_path / "run") == [0, 0, 0]
    manifests = ChainReader(LocalBucket(str(tmp_path / "run")), tmp_path / "cache").manifests()
    assert [manifest.kind for manifest in manifests] == ["anchor"]


def reads_an_offloaded_parameter(rank: int, address: str) -> str:
    engine, _ = initialize(3)
    parameter = next(engine.module.parameters())
    parameter.ds_tensor.data = torch.empty(1)  # as DeepSpeed leaves a parameter that is on a disk
    with pytest.raises(ConfigError) as raised:
        published_tensors(engine.module)
    return str(raised.value)


def test_parameters_on_a_disk_are_refused(tmp_path: Path) -> None:
    messages = run(2, reads_an_offloaded_parameter, tmp_path / "run")
    assert all("is offloaded by DeepSpeed to a disk" in message for message in messages)


def publishes_an_adapter(rank: int, address: str) -> tuple[list[int], str | None]:
    import peft

    def adapted() -> Any:
        return peft.get_peft_model(policy(), peft.LoraConfig(r=4, target_modules=["q_proj"]))

    engine, optimizer = initialize(3, adapted)
    with DeltaWeightTransferEngine(engine.module, optimizer, SyncConfig(bucket=address)) as sync:
        train(engine, 1)
        version = sync.publish().result()
        assert sync.run.adapter is not None
        return [share.changed for share in version.ranks], sync.run.adapter.base_digest


def test_a_partitioned_adapter_is_published_without_a_base_digest(tmp_path: Path) -> None:
    """A digest of the partitioned base would differ from that of the whole base, and refuse it later."""
    for changed, base_digest in run(2, publishes_an_adapter, tmp_path / "run"):
        assert all(changed)
        assert base_digest is None
