"""One rank of AsyncGRPOTrainer.

Run: `accelerate launch -m tests.support.async_ranks HOW CHECKPOINT URL ADDRESS OUTPUT TIMEOUT`.

A rank of LoRA as one more argument has an adapter trained, and not the whole policy. Beside what `async_toy` names, the
rollout worker is a stand-in, which samples at random: what is shown is who publishes what. Writes to OUTPUT/<rank>.json
what this process has seen, or the error that it has raised.
"""

from __future__ import annotations

import itertools
import json
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch.distributed.tensor import DTensor
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from hubsync.errors import HubsyncError
from hubsync.integrations.trl import HubWeightTransfer
from hubsync.publish.config import SyncConfig

from .adapted import lora
from .async_toy import GENERATIONS, make_trainer, without_gpu
from .grpo_ranks import whole_digest
from .launched import prepare

RANKS = 2


class RandomRollouts:
    """TRL's rollout worker protocol."""

    def __init__(self) -> None:
        self.rollout_buffer: queue.Queue[Any] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        self._groups = itertools.count()
        self._random = np.random.default_rng(0)

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def check_health(self, stale_after_s: float) -> None: ...

    def update_model_version(self, model_version: int) -> None:
        for _ in range(4 * GENERATIONS * RANKS):  # the trainer takes batches ahead
            self.rollout_buffer.put(
                RolloutSample(
                    prompt=[{"role": "user", "content": "x"}],
                    completion=[{"role": "assistant", "content": "y"}],
                    input_ids=self._random.integers(2, 500, 12).astype(np.int64),
                    completion_mask=np.repeat([0, 1], 6),
                    old_log_probs=np.repeat([0.0, -8.3], 6).astype(np.float32),
                    advantage=float(self._random.normal()),
                    model_version=model_version,
                    group_id=next(self._groups),
                    metrics={},
                )
            )


def main(how: str, checkpoint: str, url: str, address: str, output: str, timeout: str, lora_rank: str = "0") -> None:
    prepare(how)
    transfer = HubWeightTransfer(SyncConfig(bucket=address), timeout=float(timeout))
    with without_gpu():
        trainer = make_trainer(
            Path(checkpoint),
            Path(output),
            url,
            max_steps=2,
            rollout_worker=RandomRollouts(),
            weight_transfer=transfer,
            peft_config=lora(r=int(lora_rank)) if int(lora_rank) else None,
        )
        transfer.attach(trainer)
        gathered = count_gathered_weights()
        try:
            trainer.train()
        except HubsyncError as error:
            seen: dict[str, Any] = {"error": f"{type(error).__name__}: {error}"}
        else:
            seen = {
                "gathered": len(gathered),
                "version": transfer.last.position.version,
                "served": transfer.last.position.digest,
                "trained": whole_digest(trainer.accelerator.unwrap_model(trainer.model)),
                "trl_version": trainer.model_version,
            }
    seen["ranks"] = trainer.accelerator.num_processes
    (Path(output) / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(seen))


def count_gathered_weights() -> list[Any]:
    """Shapes of the matrices that anybody gathers from now on."""
    gathered, gather = [], DTensor.full_tensor

    def counting(self: DTensor, **settings: Any) -> Any:
        if self.ndim > 1:
            gathered.append(self.shape)
        return gather(self, **settings)

    DTensor.full_tensor = counting  # type: ignore[method-assign]
    return gathered


if __name__ == "__main__":
    main(*sys.argv[1:])
