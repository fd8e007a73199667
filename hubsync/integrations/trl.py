"""TRL callback: makes a built trainer generate on a vLLM server that follows its weights.

The trainer is built with `use_vllm=False`, because TRL's own server mode opens an NCCL group to the server during
construction. The callback then installs a generation backend that uses only HTTP. TRL asks that backend to synchronise
before a generation if an optimizer step was made since the previous one. Publishing starts in the background right
after the step, so synchronising only waits for the rest and commits.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from accelerate.utils import is_peft_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hubsync.errors import BucketUnavailable, ConfigError, ReplicaPoisoned, WrongParent
from hubsync.format.manifest import Position
from hubsync.publish import metrics
from hubsync.publish.config import SyncConfig
from hubsync.publish.engine import DeltaWeightTransferEngine
from hubsync.publish.results import Published, Ticket
from hubsync.replicas.replica import Replica
from hubsync.replicas.reports import CommitReport
from hubsync.replicas.server import plain_url
from hubsync.replicas.vllm_http import LORA_HINT, VLLMServer

from . import trl_checks, trl_compat
from .async_trl import HubWeightTransfer
from .trl_compat import server_url
from .trl_rows import PublishRows

__all__ = ["HubSyncCallback", "HubWeightTransfer", "server_url"]

logger = logging.getLogger(__name__)


class HubSyncCallback(TrainerCallback):
    """Serves a trainer's policy on a vLLM server after every optimizer step, through a bucket.

    For [`GRPOTrainer`], [`RLOOTrainer`] and the other trainers that generate through TRL's `VLLMGeneration` (they are
    listed in `hubsync.integrations.trl_checks`). After construction the trainer behaves as if it had been built with
    `use_vllm=True, vllm_mode="server"`, importance sampling correction included. The server's URL and the sampling
    settings come from the trainer's own arguments (`vllm_server_base_url`, `temperature`, ...). The trainer needs
    neither NCCL nor the `vllm` package. The callback adds itself to the trainer.

    Metrics, in addition to the trainer's own, in a row of their own of the step that made the version:
    `weight_sync/changed_fraction`, `payload_bytes`, `bits_per_change`, `compact`, `rewritten`, `detect_s`, `encode_s`,
    `upload_s`; with several ranks also `rank_payload_bytes_max`, `rank_detect_s_max`, `rank_encode_s_max`,
    `rank_upload_s_max`. In the row of the step whose completions it made: `version`, `stage_s`, `commit_s`, `pause_s`,
    and `digest_ok` of the version before.

    Attributes:
        engine: the publisher, one on every rank; None before and after training.
        commits: number of commits that changed the server's weights.
        digest_matches: number of those commits confirmed by the digest of the server's live weights.

    Args:
        trainer: a trainer that was built with `use_vllm=False`, before `train()`.
        config: the bucket and all other settings.

    Raises:
        ConfigError: the trainer is not supported; the message says why, and what to change.
        ReplicaError: the server does not answer, or lacks a feature that hubsync needs.

    Usage:

    ```python
    >>> from trl import GRPOConfig, GRPOTrainer
    >>> from hubsync import SyncConfig
    >>> from hubsync.integrations.trl import HubSyncCallback

    >>> trainer = GRPOTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     reward_funcs=reward,
    ...     args=GRPOConfig(vllm_server_base_url="http://inference-host:8000"),
    ...     train_dataset=dataset,
    ... )
    >>> HubSyncCallback(trainer, SyncConfig(bucket="hf://buckets/me/my-runs/grpo-1"))
    >>> trainer.train()
    ```
    """

    def __init__(self, trainer: Any, config: SyncConfig):
        _refuse_unsuitable(trainer)
        url = server_url(trainer.args)
        self.trainer = trainer
        others = [other for other in config.servers if plain_url(other) != plain_url(url)]
        self.config = replace(config, servers=[url, *others])
        self.engine: DeltaWeightTransferEngine | None = None
        self.commits = 0
        self.digest_matches = 0
        self._is_main = bool(trainer.accelerator.is_main_process)
        self._tickets: list[Ticket | None] = []  # since the last synchronisation; None if publishing could not start
        self._training = False
        self._published_step: int | None = None
        self._unverified: Position | None = None
        self._failure: Exception | None = None
        self._rows = self._new_rows()
        server = VLLMServer(url, config.api_key, timeout=config.stage_timeout)
        self._replica = Replica(server)
        trl_compat.generate_on_server(trainer, server, self._synchronise)
        try:
            if self._is_main:
                self._replica.check()
                self._ask_for_adapter()
                self._warn_of_biased_logprobs()
        except BaseException:  # the callback can be attached again once the server is suitable
            trl_compat.generate_without_server(trainer)
            raise
        trainer.add_callback(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._failure is not None:
            self._forget(self._failure)
        self._training, self._rows = True, self._new_rows()
        if self.engine is None:
            self.engine = self._new_engine()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detect what the step changed, and start to encode and upload it."""
        step = state.global_step + 1  # it is counted after this event
        if step != self._published_step:  # the callback may have been added twice
            self._publish(step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Publish metrics follow the row of their step. The last one is logged before trackers are closed."""
        if logs is None or not self._training:
            return
        if "loss" in logs:
            self._rows.logged(state.global_step)
        if "train_runtime" in logs:
            self._rows.logged(state.global_step)
            self._await_durable()
            self._rows.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the final policy on the server, verified."""
        if not self._training:  # the callback may have been added twice
            return
        self._training = False
        self._publish(state.global_step)  # `load_best_model_at_end` has changed the weights without a step
        self._synchronise(verify=True)
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def _forget(self, failure: Exception) -> None:
        """Discard the state of a training that ended with an error, so that the next one can start."""
        engine, self.engine = self.engine, None
        self._failure = self._published_step = self._unverified = None
        self._tickets = []
        if engine is not None:
            engine.__exit__(type(failure), failure, failure.__traceback__)

    def _new_engine(self) -> DeltaWeightTransferEngine:
        accelerator, trainer = self.trainer.accelerator, self.trainer
        return DeltaWeightTransferEngine(
            accelerator.unwrap_model(trainer.model),
            trainer.optimizer,
            self.config,
            processing_class=trainer.processing_class,
        )

    def _publish(self, step: int) -> None:
        if self.engine is None or self._failure is not None:
            return
        self._published_step = step
        try:
            self._tickets.append(self.engine.publish(step))
        except BucketUnavailable as outage:  # of an earlier step
            logger.warning("step %d will be published with a later one: %s", step, outage)
            self._tickets.append(None)
        except Exception as failure:  # raised at the next synchronisation, which TRL starts
            self._failure = failure

    def _synchronise(self, verify: bool = False) -> None:
        """Return once the server serves the weights of the last optimizer step.

        Called on every rank. Each publishes its part; the main process talks to the server. An error is raised on all.
        """
        if self._failure is None:
            try:
                self._catch_up()
                if verify:
                    self._check_digest_together()
            except Exception as failure:
                self._failure = failure
        if self._failure is not None:
            raise self._failure

    def _catch_up(self) -> None:
        if self.engine is None:  # evaluation outside of training
            self.engine = self._new_engine()
        tickets, self._tickets = self._tickets, []
        current: Ticket | None = None
        for ticket in tickets:
            current = ticket if ticket is not None and self._is_durable(ticket) else None
        self._check_digest_together()
        step = self.trainer.state.global_step
        report = self.engine.sync(step) if current is None else self.engine.deliver(current)
        self._record_published(report.published)  # after an outage `sync` has published what was missing
        self._rows.flush()
        own = report.replicas[0]  # the server that the trainer generates on
        commit = own.commit or self.engine.ranks.first(lambda: self._bring(report.published.position))
        self._record(version=commit.version, **metrics.of_commits([commit]), **metrics.of_packages(report))
        if commit.changed or own.commit is None:
            self._unverified = commit.position
            self.commits += 1

    def _bring(self, position: Position) -> CommitReport:
        """Bring `position` to the server that the trainer generates on, if a quorum committed without it."""
        self._replica.prepare(position, self.config.stage_timeout)
        return self._replica.commit(position)

    def _is_durable(self, ticket: Ticket) -> bool:
        try:
            self._record_published(ticket.result())
        except BucketUnavailable as outage:
            logger.warning("the next publish will include this one's changes: %s", outage)
            return False
        return True

    def _check_digest_together(self) -> None:
        """Check on the main process; the others wait for the outcome."""
        if self.engine is not None:
            self.engine.ranks.first(self._check_digest)

    def _check_digest(self) -> None:
        """Wait for the digest of the live weights, which the workers recompute during generation after a commit."""
        if self._unverified is None:
            return
        position, self._unverified = self._unverified, None
        try:
            self._replica.wait_verified(position, self.config.stage_timeout)
        except WrongParent as elsewhere:  # restarted, or moved by another client; the next sync repairs it
            logger.warning("not verified: %s", elsewhere)
        except ReplicaPoisoned as poisoned:
            logger.warning("%s. Rebuilding the server's weights", poisoned)
            self._record(digest_ok=0.0)
            self._replica.heal()
        else:
            self._record(digest_ok=1.0)
            self.digest_matches += 1

    def _await_durable(self) -> None:
        """Wait for publishes under way. Their errors are those of the next synchronisation."""
        for ticket in self._tickets:
            if ticket is not None and self._failure is None:
                try:
                    self._record_published(ticket.result())
                except Exception:
                    return

    def _record_published(self, published: Published) -> None:
        if published.step is not None:
            self._rows.made(published.step, metrics.of_publish(published))

    def _new_rows(self) -> PublishRows:
        return PublishRows(lambda values, step: trl_compat.log_row(self.trainer, values, step))

    def _record(self, **values: float) -> None:
        trl_compat.record(self.trainer, values)

    def _ask_for_adapter(self) -> None:
        """Make a PEFT policy generate with its adapter instead of the base model."""
        if not is_peft_model(self.trainer.model):
            return
        adapter = self._replica.status().adapter
        if adapter is None:
            raise ConfigError(
                f"the policy is a PEFT model, and {self._replica.server.url} serves no adapters: start it with "
                f"--enable-lora, and {LORA_HINT}"
            )
        trl_compat.request_model(self.trainer, adapter)

    def _warn_of_biased_logprobs(self) -> None:
        if not getattr(self.trainer, "vllm_importance_sampling_correction", False):
            return
        mode = self.trainer.vllm_generation.vllm_client.logprobs_mode()
        if mode not in (None, "processed_logprobs"):
            logger.warning(
                "The vLLM server runs with `--logprobs-mode %s`, which biases the importance sampling correction where "
                "temperature, top_p and the like change the distribution. Restart it with `--logprobs-mode "
                "processed_logprobs`, or set `vllm_importance_sampling_correction=False`.",
                mode,
            )


def _refuse_unsuitable(trainer: Any) -> None:
    args, name = trainer.args, type(trainer).__name__
    if trl_compat.family_of(trainer) is None:
        raise ConfigError(
            f"{name} does not generate through TRL's VLLMGeneration, as HubSyncCallback needs: "
            f"{trl_compat.what_fits(trainer)}"
        )
    trl_checks.require_unmoved(type(trainer))
    if trl_compat.generates_on_server(trainer):
        raise ConfigError(f"this {name} has a HubSyncCallback already: attach one only")
    if getattr(trainer, "vllm_generation", None) is not None or args.use_vllm:
        raise ConfigError(
            f"{name} was built with use_vllm=True, which sends weights by NCCL: build it with use_vllm=False (and keep "
            "vllm_server_base_url); HubSyncCallback then makes it generate on that server"
        )
    if getattr(args, "use_transformers_continuous_batching", False):
        raise ConfigError(
            "use_transformers_continuous_batching casts the policy in place, which would be published as a change of "
            "every weight: leave it False, generation happens on the vLLM server anyway"
        )
    if getattr(trainer, "loss_type", None) == "vespo" and trainer.vllm_importance_sampling_mode.startswith("sequence"):
        raise ConfigError("loss_type='vespo' needs vllm_importance_sampling_mode='token_truncate' or 'token_mask'")
