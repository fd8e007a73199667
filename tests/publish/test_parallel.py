"""Tensor and expert parallelism beside data parallelism: meshes of several dimensions, and parameters in pieces.

The expected view is what transformers saves of the whole model, which torch gathers from the same DTensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.publish.results import Published
from tests.publish.test_experts import qwen, saved
from tests.publish.test_ranks import follow
from tests.support.tiny import same_bits
from tests.support.training import device_of, run, watched

pytestmark = pytest.mark.slow

ATTENTION = {"q_proj": ColwiseParallel(), "k_proj": ColwiseParallel(), "v_proj": ColwiseParallel(),
             "o_proj": RowwiseParallel()}  # fmt: skip


def mesh_of(ranks: int, *names: str) -> Any:
    shape = (ranks,) if len(names) == 1 else (2, ranks // 2)
    return init_device_mesh(device_of(ranks), shape, mesh_dim_names=names)


def tensor_parallel(model: Any, mesh: Any) -> None:
    """Rows and columns of attention, rows of the embedding; the head by columns."""
    for layer in model.model.layers:
        parallelize_module(layer.self_attn, mesh, ATTENTION)
    parallelize_module(model, mesh, {"model.embed_tokens": RowwiseParallel(), "lm_head": ColwiseParallel()})


def place_experts(model: Any, mesh: Any, gate_up: list[Any], down: list[Any]) -> None:
    for layer in model.model.layers:
        for name, placements in (("gate_up_proj", gate_up), ("down_proj", down)):
            parameter = getattr(layer.mlp.experts, name)
            placed = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
            setattr(layer.mlp.experts, name, torch.nn.Parameter(placed))


def tp(model: Any, ranks: int) -> Any:
    """All of a tensor parallel model; gate and up projections, which are one parameter, are cut in rows of both."""
    mesh = mesh_of(ranks, "tp")
    tensor_parallel(model, mesh)
    place_experts(model, mesh, [_StridedShard(1, split_factor=2)], [Shard(2)])
    return model


def tp_unpacked(model: Any, ranks: int) -> Any:
    """Gate projections on the first ranks, up projections on the last."""
    place_experts(model, mesh_of(ranks, "tp"), [Shard(1)], [Shard(1)])
    return model


def auto(base: str, ranks: int) -> Any:
    """As transformers shards its models."""
    from transformers.distributed import DistributedConfig

    os.environ["LOCAL_RANK"] = str(dist.get_rank())  # as a launcher sets it
    config = DistributedConfig(tp_size=ranks, tp_plan="auto")
    return type(qwen(8)).from_pretrained(base, distributed_config=config, dtype=torch.float32)


def ep(model: Any, ranks: int) -> Any:
    """Experts divided; everything else on all ranks."""
    place_experts(model, mesh_of(ranks, "ep"), [Shard(0)], [Shard(0)])
    return model


def ep_tp(model: Any, ranks: int) -> Any:
    """A mesh of two dimensions for experts, and one of its dimensions for attention."""
    mesh = mesh_of(ranks, "ep", "tp")
    tensor_parallel(model, mesh["tp"])
    place_experts(model, mesh, [Shard(0), _StridedShard(1, split_factor=2)], [Shard(0), Shard(2)])
    return model


def dp_tp(model: Any, ranks: int) -> Any:
    """FSDP2 divides the rows that tensor parallelism has divided."""
    mesh = mesh_of(ranks, "dp", "tp")
    tensor_parallel(model, mesh["tp"])
    place_experts(model, mesh["tp"], [_StridedShard(1, split_factor=2)], [Shard(2)])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def dp_packed(model: Any, ranks: int) -> Any:
    """Replicas of what tensor parallel ranks hold in several pieces."""
    mesh = mesh_of(ranks, "dp", "tp")
    place_experts(model, mesh, [Replicate(), _StridedShard(1, split_factor=2)], [Replicate(), Shard(2)])
    return model


PLANS: dict[str, Callable[[Any, int], Any]] = {
    "tp": tp, "tp_unpacked": tp_unpacked, "ep": ep, "ep_tp": ep_tp, "dp_tp": dp_tp, "dp_packed": dp_packed,
}  # fmt: skip


def train(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """An optimizer step with random gradients, equal on replicas."""
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=random).to(parameter.device)
        is_placed = isinstance(parameter, DTensor)
        parameter.grad = (
            distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
            if is_placed
            else gradient
        )
    optimizer.step()
    optimizer.zero_grad()


def whole(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()
        for name, tensor in model.state_dict().items()
    }


def publishes(
    rank: int, directory: str, plans: list[str], ranks: int
) -> list[tuple[list[Published], dict[str, torch.Tensor], dict[str, int]]]:
    outcomes = []
    for plan in plans:
        whole_model = qwen(8).to(device_of(ranks))
        model = auto(f"{directory}/base", ranks) if plan == "auto" else PLANS[plan](whole_model, ranks)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
        with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=f"{directory}/{plan}")) as engine:
            versions = []
            for step in range(2):
                train(model, optimizer, step)
                with watched() as watch:
                    versions.append(engine.publish().result())
            engine.anchor()
        outcomes.append((versions, whole(model), watch.collectives))
    return outcomes


def check(ranks: int, plans: list[str], tmp_path: Path) -> None:
    qwen(8).save_pretrained(tmp_path / "base")
    by_rank = run(ranks, publishes, tmp_path, plans, ranks)
    for plan, outcomes in zip(plans, zip(*by_rank, strict=True), strict=True):
        versions, trained, _ = outcomes[0]
        model = qwen(8)
        model.load_state_dict(trained)
        (tmp_path / f"{plan}-cache").mkdir()
        view = follow(tmp_path / plan, tmp_path / f"{plan}-cache")
        assert same_bits(view.tensors, saved(model, tmp_path / f"{plan}-saved")), plan
        assert view.position == versions[-1].position
        for others, _, collectives in outcomes:
            assert [other.position for other in others] == [version.position for version in versions]
            assert collectives.keys() == {"allgather_.default"}, "of outcomes, not of weights"
        for version in versions:
            assert sum(share.changed for share in version.ranks) == version.changed
            assert min(share.changed for share in version.ranks) > version.changed / (3 * ranks), "they share the work"


def test_two_ranks_publish_what_transformers_saves(tmp_path: Path) -> None:
    check(2, ["auto", "tp_unpacked", "ep"], tmp_path)


@pytest.mark.long
def test_four_ranks_publish_what_transformers_saves(tmp_path: Path) -> None:
    check(4, ["dp_tp", "ep_tp", "dp_packed"], tmp_path)


@pytest.mark.long
def test_three_ranks_divide_unevenly(tmp_path: Path) -> None:
    check(3, ["tp", "tp_unpacked", "ep"], tmp_path)
