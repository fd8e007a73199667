"""One rank of a GRPO training that a server follows.

Run: `accelerate launch -m tests.support.grpo_ranks HOW BASE URL BUCKET OUT`.

Writes to OUT/<rank>.json what the callback has counted, and the digest of what was trained.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from trl import GRPOConfig, GRPOTrainer

from hubsync import SyncConfig
from hubsync.format.digest import digest_view
from hubsync.integrations.trl import HubSyncCallback
from hubsync.publish.view.deepspeed import Partition, is_partitioned
from hubsync.publish.view.live import published_tensors, table_of
from hubsync.publish.view.strided import StridedView

from .launched import prepare

STEPS = 2


def variety(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between completions of a random policy, so that there is something to learn."""
    return [float(len(set(completion))) for completion in completions]


def whole_digest(model: torch.nn.Module) -> str:
    """Of the whole view, from weights that are gathered for it."""
    trained = published_tensors(model)
    view = {name: _gathered(tensor).detach().bfloat16() for name, tensor in trained.items()}
    return digest_view(table_of(trained, torch.bfloat16), view).hex


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, StridedView):
        whole, place = _gathered(tensor.whole).detach(), tensor.place
        return whole.as_strided(place.shape, place.stride, whole.storage_offset() + place.offset)
    if isinstance(tensor, Partition):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor.parameter]):
            return tensor.parameter.data.clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(how: str, base: str, url: str, bucket: str, output: str) -> None:
    prepare(how)
    trainer = GRPOTrainer(
        model=base,
        reward_funcs=variety,
        train_dataset=Dataset.from_dict({"prompt": ["one plus two", "the quick brown fox"] * 16}),
        args=GRPOConfig(
            output_dir=output,
            max_steps=STEPS,
            learning_rate=1e-4,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=8,
            vllm_server_base_url=url,
            use_cpu=not how.startswith("zero"),
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        ),
    )
    callback = HubSyncCallback(trainer, SyncConfig(bucket=bucket))
    trainer.train()
    counted = {
        "ranks": trainer.accelerator.num_processes,
        "commits": callback.commits,
        "matches": callback.digest_matches,
        "digest": whole_digest(trainer.accelerator.unwrap_model(trainer.model)),
        "logged": [row for row in trainer.state.log_history if "weight_sync/changed_fraction" in row],
        "sharded": any(isinstance(p, DTensor) or is_partitioned(p) for p in trainer.model.parameters()),
    }
    (Path(output) / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(counted))


if __name__ == "__main__":
    main(*sys.argv[1:])
