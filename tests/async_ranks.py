"""AsyncGRPOTrainer on two ranks: `torchrun -m tests.async_ranks CHECKPOINT OUTPUT URL ADDRESS`.

Beside what `async_toy` names, the rollout worker is a stand-in, which samples at random: what is shown is who
publishes, and that the other rank does not wait for ever.
"""

from __future__ import annotations

import itertools
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from hubsync.integrations.trl import HubWeightTransfer
from hubsync.trainer.config import SyncConfig

from .async_toy import GENERATIONS, make_trainer, without_gpu

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


def main(checkpoint: str, output: str, url: str, address: str) -> None:
    transfer = HubWeightTransfer(SyncConfig(bucket=address), timeout=300)
    with without_gpu():
        trainer = make_trainer(
            Path(checkpoint),
            Path(output),
            url,
            max_steps=2,
            rollout_worker=RandomRollouts(),
            weight_transfer=transfer,
        )
        transfer.attach(trainer)
        trainer.train()
    assert trainer.accelerator.num_processes == RANKS
    if trainer.accelerator.is_main_process:
        assert trainer.model_version == 3
        position = transfer.last.position
        (Path(output) / "newest").write_text(f"{position.version} {position.digest}")
    else:
        assert transfer.last is None


if __name__ == "__main__":
    main(*sys.argv[1:])
