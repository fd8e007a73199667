"""The demo: a real GRPO training, a real vLLM server synced through a bucket, and an exact comparison at the end.

Training and sync use the public API as a user would: `GRPOTrainer`, `SyncConfig` and `HubSyncCallback`, as in
`examples/grpo_disaggregated/train.py`. The rest of this file starts the servers and measures.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader
from hubsync.errors import ConfigError
from hubsync.integrations.trl import HubSyncCallback
from hubsync.publish.config import SyncConfig
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer

from . import task
from .compare import greedy
from .serving import EXTENSION, ServerProcess
from .view import Progress

LEARNING_RATE = 4e-6
COMPLETIONS_PER_STEP = 64
COMPLETIONS_PER_PROMPT = 8
PROMPTS_TO_COMPARE = 8
PHASES = ("detect", "encode", "upload", "stage", "commit", "pause")


class Demo:
    """One run of the demo.

    Args:
        workdir: existing directory for the checkpoint, the caches, the servers' logs and the final anchor.
        steps: optimizer steps.
        bucket: address of the run.
        server: URL of a running vLLM server of `workdir/base`; None starts one.
    """

    def __init__(self, workdir: Path, steps: int, bucket: str, server: str | None = None):
        self.workdir = workdir
        self.steps = steps
        self.bucket = bucket
        self.server = server
        self.console = Console()

    def run(self) -> dict[str, Any]:
        """Train, sync and compare. Returns the measurements; `exact` is True if the servers agree bit for bit."""
        started = time.monotonic()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        with ExitStack() as servers:
            base = self._base()
            url = self.server or self._serve(servers, base, "server", "starting policy")
            callback, rows = self._train(base, url)
            self._verify(url)
            fresh = self._serve(servers, self._newest_anchor(), "fresh", "final anchor, downloaded from the bucket")
            equal = self._equal(url, fresh)
        return {**self._conclude(callback, rows, equal), "seconds": time.monotonic() - started}

    def _base(self) -> Path:
        """The starting policy's checkpoint, made if it does not exist."""
        base = self.workdir / "base"
        if (base / "config.json").exists():
            return base
        self._say("making the starting policy: a random Qwen3, trained on sums for a few seconds")
        task.make_checkpoint(base)
        if self.server is not None:
            raise ConfigError(
                f"the server must serve the demo's starting policy. Copy {base} to its machine, start it with\n"
                f"  VLLM_PLUGINS=hubsync HUBSYNC_BUCKET={self.bucket} vllm serve {base} "
                f"--worker-extension-cls {EXTENSION} --logprobs-mode processed_logprobs --max-model-len 512\n"
                f"(on a CPU with the settings in README.md, Without a GPU), and run the demo again with --workdir "
                f"{self.workdir}"
            )
        return base

    def _serve(self, servers: ExitStack, model: Path, name: str, label: str) -> str:
        """Start a vLLM server of `model` that `servers` stops; returns its URL."""
        self._say(f"starting a vLLM server of the {label}")
        process = servers.enter_context(
            ServerProcess(
                model,
                self.workdir / f"{name}.log",
                bucket=self.bucket,
                environment={"HUBSYNC_CACHE": str(self.workdir / f"{name}-cache")},
                arguments=["--logprobs-mode", "processed_logprobs"],
            )
        )
        process.wait_ready()
        return process.url

    def _train(self, base: Path, url: str) -> tuple[HubSyncCallback, list[dict[str, float]]]:
        """Train for `steps` optimizer steps, with a sync after each. Returns the callback and the rows of the log."""
        trainer = GRPOTrainer(
            model=str(base),
            reward_funcs=task.tagged_answer,
            train_dataset=task.prompts(self.steps * COMPLETIONS_PER_STEP // COMPLETIONS_PER_PROMPT),
            args=GRPOConfig(
                output_dir=str(self.workdir / "trainer"),
                max_steps=self.steps,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                per_device_train_batch_size=COMPLETIONS_PER_STEP,
                num_generations=COMPLETIONS_PER_PROMPT,
                max_completion_length=task.MAX_COMPLETION_LENGTH,
                vllm_server_base_url=url,
                use_cpu=not torch.cuda.is_available(),
                bf16=False,  # fp32 throughout: the model is tiny, and CPUs are slow at bf16
                gradient_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
        )
        trainer.remove_callback(PrinterCallback)
        callback = HubSyncCallback(trainer, SyncConfig(bucket=self.bucket, anchor_at_close=True))
        progress = Progress(self.console)
        trainer.add_callback(progress)
        trainer.train()
        return callback, progress.rows

    def _verify(self, url: str) -> None:
        """ReplicaPoisoned or WrongParent unless the server's live weights are those of the newest version."""
        newest = self._reader().newest()
        Replica(VLLMServer(url)).wait_verified(newest)
        self._say(f"the server's live weights are those of {newest}")

    def _newest_anchor(self) -> Path:
        """Download the newest anchor from the bucket."""
        reader = self._reader()
        anchor = [manifest for manifest in reader.manifests() if manifest.kind == "anchor"][-1]
        return reader.fetch(anchor)[0].parent

    def _reader(self) -> ChainReader:
        return ChainReader(open_bucket(self.bucket), self.workdir / "downloads")

    def _equal(self, url: str, fresh: str) -> bool:
        """Whether both servers give the same greedy tokens with exactly the same log-probabilities."""
        prompts = [prompt for prompt, _ in task.problems()][:PROMPTS_TO_COMPARE]
        return greedy(url, prompts) == greedy(fresh, prompts)

    def _conclude(self, callback: HubSyncCallback, rows: list[dict[str, float]], equal: bool) -> dict[str, Any]:
        manifests = self._reader().manifests()
        # The bucket may hold versions of earlier trainings; this training's are those of the last writer epoch.
        deltas = [delta for delta in manifests if delta.kind == "delta" and delta.epoch == manifests[-1].epoch]
        payload, changed = sum(delta.nbytes for delta in deltas), sum(delta.changed for delta in deltas)
        tenth = max(1, len(rows) // 10)
        rewards = [row["reward"] for row in rows]
        table = self._reader().run().table
        result: dict[str, Any] = {
            "steps": rows,
            "reward_first": fmean(rewards[:tenth]),
            "reward_last": fmean(rewards[-tenth:]),
            "commits": callback.commits,
            "digest_matches": callback.digest_matches,
            "fresh_server_equal": equal,
            "exact": equal and callback.digest_matches == callback.commits,
            "parameters": table.numel,
            "changed_fraction": changed / (len(deltas) * table.numel),
            "payload_bytes": payload,
            "dense_bytes": len(deltas) * table.nbytes,
            "bits_per_change": 8 * payload / changed,
            "median_s": {phase: _median(rows, f"weight_sync/{phase}_s") for phase in PHASES},
        }
        self._say(
            f"[bold]reward {result['reward_first']:.2f} -> {result['reward_last']:.2f}[/] in {len(rows)} steps; "
            f"{result['changed_fraction']:.2%} of the weights changed per step; uploaded {payload:,} bytes instead of "
            f"{result['dense_bytes']:,} ({result['bits_per_change']:.2f} bits per changed element)"
        )
        times = ", ".join(f"{phase} {1e3 * seconds:.1f} ms" for phase, seconds in result["median_s"].items())
        self._say(f"median of a sync: {times}")
        self._say(f"{callback.digest_matches} of {callback.commits} commits verified by a digest of the live weights")
        same = "[green]exactly the same[/]" if equal else "[red]DIFFERENT[/]"
        self._say(f"a fresh server of the final anchor returns {same} tokens and log-probabilities")
        return result

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def _median(rows: list[dict[str, float]], metric: str) -> float:
    """Median over all rows but the first, whose step was not preceded by a sync with changes."""
    return median(row[metric] for row in rows[1:] if metric in row) if len(rows) > 1 else 0.0
