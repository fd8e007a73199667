"""Weight transfer for TRL's asynchronous trainers, passed to their constructor.

TRL calls the transfer between two optimizer steps on the main process, and advances its policy version when the call
returns. So `send_weights` returns only when the servers serve the new weights. The servers keep generating: their
commits need no pause, and `pause` and `resume` do nothing. The other processes take part where TRL would gather
weights: they publish their shards and receive the outcome.
"""

from __future__ import annotations

import bisect
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hubsync.errors import (
    BucketUnavailable,
    ConfigError,
    HubsyncError,
    NoPath,
    ReplicaBehind,
    ReplicaError,
    ReplicaUnreachable,
    ReplicaUnsuitable,
)
from hubsync.format.manifest import Position
from hubsync.publish import metrics
from hubsync.publish.config import SyncConfig
from hubsync.publish.engine import DeltaWeightTransferEngine
from hubsync.publish.results import Published, SyncReport
from hubsync.replicas.deployment import Deployment, HotloadReport
from hubsync.replicas.replica import Replica
from hubsync.replicas.server import checked_seconds
from hubsync.replicas.vllm_http import VLLMServer

from . import trl_checks, trl_compat

logger = logging.getLogger(__name__)

_RETRY_S = 1.0
_ATTEMPT_S = 5.0  # with less time than this left, a slow server could be reported as behind
_PASSES = (ReplicaUnreachable, ReplicaBehind, NoPath)  # errors worth a retry

# TRL version of a sample with unknown weights: older than any `max_staleness` allows.
_ANCIENT = -(2**31)


class HubWeightTransfer:
    """The weight transfer of [`AsyncGRPOTrainer`] and [`AsyncDistillationTrainer`] through a bucket.

    The training loop waits while changes are found, encoded, uploaded, downloaded, staged and committed. The servers
    generate during all of it. TRL's policy version advances when a quorum of the servers serves the new weights.

    Every rank publishes its own weights: its shards under FSDP2, an equal piece under DDP. No weights are gathered. An
    error of one rank is raised on all ranks. For a PEFT policy, the adapter is published and never merged into the
    base, and samples are requested from the servers' adapter by its name there.

    Samples are dated by the weights that made them. TRL's rollout workers request tokens from `/inference/v1/generate`,
    which states the weights of every token. A sample's version is the oldest of them, or the version acknowledged
    before its group's first request if that is older. So `max_staleness` never underestimates, whichever server of a
    quorum answered, and samples of weights that are no version of this run (from a restarted server) are dropped. The
    range is in the sample's metrics and logged, in versions of the run, as `weight_sync/version_min` and
    `weight_sync/version_max`.

    Other metrics: `weight_sync/version`, `acknowledged` (servers that serve it), `changed_fraction`, `payload_bytes`,
    `bits_per_change`, `compact`, `detect_s`, `encode_s`, `upload_s`, `stage_s`, `commit_s`, `pause_s`.

    Attributes:
        engine: the publisher, one on every rank; None before and after training.
        last: report of the last synchronisation; None before the first.
        version_map: on the main process, maps versions of the run to versions of TRL.

    Args:
        config: the bucket and all other settings. `servers` generate for the trainer; the default is the trainer's
            `vllm_server_base_url`. If that is a load balancer, list all servers behind it.
        quorum: number of servers that must serve a version before TRL's version advances; default is `config.quorum`,
            or all. With fewer, a dead or slow server does not stop training; it catches up with a later version.
        timeout: seconds for one synchronisation, from its start until the quorum serves it.

    Raises:
        ConfigError: invalid quorum or timeout.

    Usage:

    ```python
    >>> from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
    >>> from hubsync import SyncConfig
    >>> from hubsync.integrations.trl import HubWeightTransfer

    >>> transfer = HubWeightTransfer(SyncConfig(bucket="hf://buckets/me/my-runs/async-1"))
    >>> trainer = AsyncGRPOTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     reward_funcs=reward,
    ...     args=AsyncGRPOConfig(vllm_server_base_url="http://inference-host:8000"),
    ...     train_dataset=dataset,
    ...     weight_transfer=transfer,
    ... )
    >>> transfer.attach(trainer)
    >>> trainer.train()
    ```
    """

    def __init__(self, config: SyncConfig, *, quorum: int | None = None, timeout: float = 600.0):
        checked_seconds("timeout", timeout)
        if quorum is not None and quorum < 1:
            raise ConfigError(f"quorum must be at least 1, not {quorum}")
        self.config = config
        self.quorum = quorum or config.quorum or None
        self.timeout = timeout
        self.engine: DeltaWeightTransferEngine | None = None
        self.last: HotloadReport | None = None
        self._trainer: Any = None
        self._begun = False
        self._deployment: Deployment | None = None
        self.version_map = VersionMap()
        self._generates_on: VLLMServer | None = None  # to check for stated versions
        self._is_adapted = False
        self._rollouts_are_ready = False

    def attach(self, trainer: Any) -> None:
        """Attach to the trainer's policy. Call it on all processes, between construction and `train()`.

        Raises:
            ConfigError: the trainer is not supported; the message says why, and what to change.
        """
        if not trl_compat.takes_weight_transfer(trainer):
            raise ConfigError(f"{type(trainer).__name__} takes no weight transfer: {trl_compat.what_fits(trainer)}")
        if self._trainer is trainer:
            raise ConfigError(f"this transfer is attached to this {type(trainer).__name__} already: attach it once")
        trl_checks.require_unmoved(type(trainer))
        self._is_adapted = is_peft_model(trainer.accelerator.unwrap_model(trainer.model))
        if self._is_adapted:
            trl_compat.keep_adapter_apart(trainer)
        self._trainer, self._rollouts_are_ready = trainer, False
        url = trl_compat.server_url(trainer.args)
        self.config = replace(self.config, servers=list(self.config.servers) or [url])
        trl_compat.join_transfer(trainer, self._synchronise)
        if not trainer.accelerator.is_main_process:
            trainer.add_callback(_Leaving(self))  # TRL ends the transfer on the main process
            return
        if trainer.weight_transfer is not self:
            raise ConfigError("build the trainer with weight_transfer=transfer before transfer.attach(trainer)")
        server = self._server(url)
        trl_compat.authorize(trainer, server)
        if trl_compat.date_samples(trainer, server.access, self._date):
            self._generates_on = server
        elif self.quorum not in (None, len(self.config.servers)):
            raise ConfigError(
                f"samples of the {type(trainer.rollout_worker).__name__} of this trainer do not say which weights made "
                "them, and a server outside of the quorum may be behind: leave quorum out, or use TRL's own workers"
            )

    # --- called by TRL, on the main process

    def init_weight_transfer(self) -> None:
        """Do nothing yet. The first synchronisation, which all ranks join, creates or resumes the run."""
        if self._trainer is None:
            raise ConfigError(
                "the transfer is attached to no trainer: call transfer.attach(trainer) before trainer.train()"
            )
        self._begun = True

    def pause(self) -> None:
        """Do nothing: requests continue while weights change. A commit pauses a server that needs it."""

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Publish the current policy and return once a quorum of the servers serves it.

        Raises:
            BucketUnavailable: the new version was not durable in time.
            ReplicaError: too few servers serve it in time; the message names those that do not.
        """
        # Empty after `attach`. Otherwise it gathers shards with the other ranks, which wait forever if not drained.
        for _ in iterator:
            pass
        if not self._begun:
            raise ConfigError("this transfer has ended: make a new one for another training")
        self._synchronise()

    def resume(self) -> None:
        """Do nothing; see `pause`."""

    def destroy(self) -> None:
        """Stop. The servers keep serving their version."""
        deployment, engine = self._deployment, self.engine
        self._deployment = self.engine = None
        self._begun = False
        if deployment is not None:
            deployment.close()
        if engine is not None:
            engine.__exit__(*sys.exc_info())  # TRL calls this after errors, too

    # --- on all ranks

    def _synchronise(self) -> None:
        """Bring the current policy to the servers. A collective: all ranks raise the error of one."""
        deadline = time.monotonic() + self.timeout
        if self.engine is None:
            self.engine = self._new_engine()
        engine = self.engine
        published = self._publish(engine, deadline)
        self.last = report = self._deliver(engine, published.position, deadline)
        engine.ranks.first(lambda: self._acknowledge(published, report))

    def _new_engine(self) -> DeltaWeightTransferEngine:
        trainer, config = self._trainer, self.config
        engine = DeltaWeightTransferEngine(
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.optimizer,
            replace(config, servers=[], quorum=0),  # the deployment has them, with one timeout for all
            processing_class=trainer.processing_class,
        )
        if trainer.accelerator.is_main_process:
            self._deployment = Deployment(
                config.servers,
                kv_cache=config.kv_cache,
                api_key=config.api_key,
                quorum=self.quorum or 0,
                request_timeout=config.commit_timeout,
            )
        return engine

    def _publish(self, engine: DeltaWeightTransferEngine, deadline: float) -> Published:
        while True:
            try:
                ticket = engine.publish(self._trainer.state.global_step)
                return engine.ranks.together(partial(ticket.result, _until(deadline)))
            except TimeoutError:
                raise BucketUnavailable(
                    f"the new version was not in the bucket after {self.timeout:g} s: set a longer timeout, or check "
                    f"why {self.config.bucket} is slow"
                ) from None
            except BucketUnavailable as outage:
                if engine.ranks.first(lambda: _until(deadline) < _RETRY_S):  # rank 0's clock decides for all
                    raise
                logger.warning("retrying: %s", outage)
                time.sleep(_RETRY_S)

    def _deliver(self, engine: DeltaWeightTransferEngine, position: Position, deadline: float) -> HotloadReport:
        """Return once a quorum serves `position`. Retries unreachable servers, which may be starting."""
        while True:
            report = engine.ranks.first(lambda: self._hotload(position, deadline))
            if len(report.commits) >= report.needed:
                return report
            if _needs_anchor(report):
                engine.anchor()

    # --- on the main process

    def _hotload(self, position: Position, deadline: float) -> HotloadReport:
        """Make one attempt. After a failure, return when a retry is due, or raise if none can help in time."""
        assert self._deployment is not None
        report = self._deployment.hotload(position, timeout=_until(deadline))
        if len(report.commits) >= report.needed:
            return report
        errors = [replica.error for replica in report.replicas if replica.error is not None]
        if _until(deadline) < _RETRY_S + _ATTEMPT_S or not any(isinstance(error, _PASSES) for error in errors):
            raise _missed(report)
        if not _needs_anchor(report):
            time.sleep(_RETRY_S)
        return report

    def _acknowledge(self, published: Published, report: HotloadReport) -> None:
        if not self._rollouts_are_ready:
            self._prepare_rollouts(report)
        # TRL counts after this call, in the same thread that takes samples out of its queue.
        self.version_map.note(self._trainer.model_version + 1, published.version)
        self._record(published, report)

    def _date(self, sample: Any, oldest: int) -> None:
        """Set TRL's version of a sample to that of its oldest weights.

        TRL's value, the version acknowledged before the first request, stays if it is older.
        """
        sample.model_version = min(sample.model_version, self.version_map.of(oldest))

    def _prepare_rollouts(self, report: HotloadReport) -> None:
        """Configure rollouts, once: the servers serve the first version, and TRL's rollout process has not started."""
        adapter = self._name_of_adapter(report) if self._is_adapted else None
        if adapter is not None and not trl_compat.roll_out_with(self._trainer, adapter):
            logger.warning("the servers call the adapter %r: make your rollout worker request it as its model", adapter)
        if self._generates_on is not None:
            self._generates_on.require_stated_versions(adapter)
        self._rollouts_are_ready = True

    def _server(self, url: str) -> VLLMServer:
        return VLLMServer(url, self.config.api_key, timeout=self.config.commit_timeout)

    def _name_of_adapter(self, report: HotloadReport) -> str:
        """The adapter's name on the servers that serve the first version, which requests pass as their model."""
        names = {}
        for url, replica in zip(self.config.servers, report.replicas, strict=True):
            if replica.commit is not None:
                with closing(self._server(url)) as server:
                    names[replica.url] = str(Replica(server).status().adapter)
        if len(set(names.values())) > 1:
            raise ReplicaUnsuitable(f"servers call the adapter differently, {names}: set one HUBSYNC_LORA_NAME for all")
        return next(iter(names.values()))

    def _record(self, published: Published, report: HotloadReport) -> None:
        synced = SyncReport(published, report.commits, report.hotload_s, report.replicas)
        values = {
            **metrics.of_publish(published),
            "version": published.version,
            "acknowledged": len(report.commits),
            **metrics.of_commits(report.commits),
            **metrics.of_packages(synced),
        }
        trl_compat.record(self._trainer, values)


class _Leaving(TrainerCallback):
    """Ends the transfer on ranks where TRL does not."""

    def __init__(self, transfer: HubWeightTransfer):
        self._transfer = transfer

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._transfer.destroy()


def _until(deadline: float) -> float:
    """Remaining seconds."""
    return max(deadline - time.monotonic(), 0.0)


def _needs_anchor(report: HotloadReport) -> bool:
    return any(isinstance(replica.error, NoPath) for replica in report.replicas)


def _missed(report: HotloadReport) -> HubsyncError:
    """An error that names every missing server and why. For a single server, its own error."""
    missing = [replica for replica in report.replicas if replica.commit is None]
    if len(report.replicas) == 1 and missing[0].error is not None:
        return missing[0].error
    why = "; ".join(f"{replica.url}: {replica.error}" for replica in missing)
    served = f"{len(report.commits)} of {len(report.replicas)} servers serve {report.position}"
    return ReplicaError(
        f"{served}, and {report.needed} must. {why}. Restart the missing servers, or set a smaller quorum"
    )


class VersionMap:
    """Maps versions of the run to TRL's versions. TRL counts synchronisations; a run counts changes."""

    def __init__(self) -> None:
        self._run: list[int] = []
        self._trl: list[int] = []

    def note(self, trl_version: int, run_version: int) -> None:
        """The policy of TRL's version, the newest so far, is published as `run_version`."""
        if self._run and self._run[-1] == run_version:
            self._trl[-1] = trl_version  # nothing changed since
        else:
            self._run.append(run_version)
            self._trl.append(trl_version)

    @property
    def versions(self) -> dict[int, int]:
        """TRL's version -> the version of the run; where nothing had changed between several of TRL's, the newest."""
        return dict(zip(self._trl, self._run, strict=True))

    def of(self, run_version: int) -> int:
        """The newest of TRL's versions whose policy is not newer than `run_version`."""
        index = bisect.bisect_right(self._run, run_version) - 1
        return self._trl[index] if index >= 0 else _ANCIENT
