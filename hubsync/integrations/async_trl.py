"""hubsync in TRL's asynchronous trainers: the weight transfer that they take in their constructor.

TRL calls it between two optimizer steps, on the main process, and moves its policy version when it has returned. So
`send_weights` returns when the servers serve the new weights, and not before. They generate all the while: their
commits need no pause, and `pause` and `resume` do nothing. Meanwhile the other processes are where TRL would gather
weights; there they publish what they own, and learn what came of it.
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
from hubsync.replicas.http_client import new_client
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

    Servers generate while changes are found, encoded, uploaded, downloaded and staged, and while they are committed;
    the training loop waits meanwhile, and TRL's policy version moves when a quorum of the servers serves the new
    weights.

    Every rank publishes what it owns: its shards under FSDP2, an equal piece under DDP. No weights are gathered, and
    what one rank raises all raise. Of a PEFT policy the adapter is published, and never merged into the base; samples
    are made by the adapter of the servers, by the name that they call it.

    Samples are dated by what made them. TRL's rollout workers are made to ask for tokens through
    `/inference/v1/generate`, which states the weights behind every token; a sample's version is that of the oldest of
    them, or the one that had been acknowledged before its group's first request if that is older. So `max_staleness`
    never counts too little, whichever server of a quorum answered, and a sample of weights that are of no version of
    this run (a server that was restarted) is dropped. The range is on the sample, and logged, as
    `weight_sync/version_min` and `weight_sync/version_max`, in versions of the run.

    Other metrics: `weight_sync/version`, `acknowledged` (servers that serve it), `changed_fraction`, `payload_bytes`,
    `bits_per_change`, `compact`, `detect_s`, `encode_s`, `upload_s`, `stage_s`, `commit_s`, `pause_s`.

    Attributes:
        engine: the publisher, one on every rank; None before training, and after it.
        last: what the last synchronisation delivered; None before the first.
        version_map: on the main process, which version of the run each version of TRL is.

    Args:
        config: where the bucket is, and the rest of what hubsync needs to know. `servers` are those that generate for
            the trainer; default is the trainer's `vllm_server_base_url`. Name them all if that is a load balancer.
        quorum: how many of the servers must serve a version before TRL's moves to it; None is all of them. With fewer,
            a dead or slow server does not stop training; it catches up with a later version.
        timeout: seconds that one synchronisation may take, from its begin until the quorum serves it.

    Raises:
        ConfigError: a quorum or timeout that cannot be.

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
        self.quorum = quorum
        self.timeout = timeout
        self.engine: DeltaWeightTransferEngine | None = None
        self.last: HotloadReport | None = None
        self._trainer: Any = None
        self._begun = False
        self._deployment: Deployment | None = None
        self.version_map = VersionMap()
        self._generates_on: str | None = None  # the server to ask whether it states versions
        self._is_adapted = False
        self._rollouts_are_ready = False

    def attach(self, trainer: Any) -> None:
        """Learn which policy this is about. Call it on all processes, between construction and `train()`.

        Raises:
            ConfigError: for a trainer that cannot be served this way; the message says why, and what to change.
        """
        if not trl_compat.takes_weight_transfer(trainer):
            raise ConfigError(
                f"{type(trainer).__name__} takes no weight transfer: HubSyncCallback is for {trl_compat.family_names()}"
            )
        if self._trainer is trainer:
            raise ConfigError(f"this transfer is attached to this {type(trainer).__name__} already: once is enough")
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
        if trl_compat.date_samples(trainer, self._date):
            self._generates_on = url
        elif self.quorum not in (None, len(self.config.servers)):
            raise ConfigError(
                f"samples of a {type(trainer.rollout_worker).__name__} of this trainer do not say which weights made "
                "them, and a server outside of the quorum may be behind: leave quorum out (TRL's own workers can be "
                "made to say it)"
            )

    # --- what TRL calls, on the main process

    def init_weight_transfer(self) -> None:
        """Nothing yet: the other ranks come to the first synchronisation, and there the run is created or continued."""
        if self._trainer is None:
            raise ConfigError("call transfer.attach(trainer) before trainer.train(): it does not know the policy")
        self._begun = True

    def pause(self) -> None:
        """Nothing: requests go on while weights change. A server that has to be paused for its commit is, by that."""

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Return once a quorum of the servers serves the policy as it is now.

        Raises:
            BucketUnavailable: the new version was not durable in time.
            ReplicaError: too few servers serve it, in time or at all; the message names those that do not.
        """
        # Empty where `attach` has been; else it gathers shards with the other ranks, which would wait for ever.
        for _ in iterator:
            pass
        if not self._begun:
            raise ConfigError("this transfer has ended: make a new one for another training")
        self._synchronise()

    def resume(self) -> None:
        """Nothing; see `pause`."""

    def destroy(self) -> None:
        """Stop. The servers keep what they serve."""
        deployment, engine = self._deployment, self.engine
        self._deployment = self.engine = None
        self._begun = False
        if deployment is not None:
            deployment.close()
        if engine is not None:
            engine.__exit__(*sys.exc_info())  # TRL comes here on its way out of an error, too

    # --- on all ranks

    def _synchronise(self) -> None:
        """Bring the policy as it is now to the servers. Collective: what one rank raises all raise."""
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
            replace(config, servers=[], quorum=0),  # they are the deployment's, which knows a time for all of it
            processing_class=trainer.processing_class,
        )
        if trainer.accelerator.is_main_process:
            self._deployment = Deployment(
                config.servers,
                kv_cache=config.kv_cache,
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
                    f"the new version was not in the bucket after {self.timeout:g} s: set a longer timeout, or see why "
                    f"{self.config.bucket} is slow"
                ) from None
            except BucketUnavailable as outage:
                if engine.ranks.first(lambda: _until(deadline) < _RETRY_S):  # one clock decides for all
                    raise
                logger.warning("trying again: %s", outage)
                time.sleep(_RETRY_S)

    def _deliver(self, engine: DeltaWeightTransferEngine, position: Position, deadline: float) -> HotloadReport:
        """Return once a quorum serves `position`. Who cannot be reached is asked again: it may be starting."""
        while True:
            report = engine.ranks.first(lambda: self._hotload(position, deadline))
            if len(report.commits) >= report.needed:
                return report
            if _needs_anchor(report):
                engine.anchor()

    # --- on the main process

    def _hotload(self, position: Position, deadline: float) -> HotloadReport:
        """One attempt. If it failed and another one may not, this returns when it is time for that; else it raises."""
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
        """Set TRL's version of a sample to that of the oldest weights that had a part in it.

        TRL's own, the version acknowledged before the first request, stays where it is older.
        """
        sample.model_version = min(sample.model_version, self.version_map.of(oldest))

    def _prepare_rollouts(self, report: HotloadReport) -> None:
        """Once: the servers serve the first version, and TRL's process of rollouts is about to start."""
        adapter = self._name_of_adapter(report) if self._is_adapted else None
        if adapter is not None and not trl_compat.roll_out_with(self._trainer, adapter):
            logger.warning("the servers call the adapter %r: have your rollout worker name it as its model", adapter)
        if self._generates_on is not None:
            self._require_stated_versions(self._generates_on, adapter)
        self._rollouts_are_ready = True

    def _name_of_adapter(self, report: HotloadReport) -> str:
        """What requests must name as their model, of all servers that serve the first version."""
        names = {}
        for replica in report.replicas:
            if replica.commit is not None:
                with closing(VLLMServer(replica.url, timeout=self.config.commit_timeout)) as server:
                    names[replica.url] = str(Replica(server).status().adapter)
        if len(set(names.values())) > 1:
            raise ReplicaUnsuitable(f"servers call the adapter differently, {names}: set one HUBSYNC_LORA_NAME for all")
        return next(iter(names.values()))

    def _require_stated_versions(self, url: str, adapter: str | None) -> None:
        """ReplicaUnsuitable unless the server that generates says which weights made its tokens."""
        request = {"model": adapter, "token_ids": [1], "sampling_params": {"max_tokens": 1, "ignore_eos": True}}
        with new_client(url) as client:
            answer = client.post(f"{url}/inference/v1/generate", json=request, timeout=self.config.commit_timeout)
        if answer.status_code == 404:
            raise ReplicaUnsuitable(f"{url} does not say which weights made a sample: start it with --enable-scale-out")
        if answer.is_error or not answer.json()["choices"][0].get("weight_versions"):
            raise ReplicaUnsuitable(
                f"{url} does not say which weights made a sample: hubsync needs vLLM >= 0.32 there ({answer.text:.200})"
            )

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
    """Ends the transfer on a rank where TRL does not."""

    def __init__(self, transfer: HubWeightTransfer):
        self._transfer = transfer

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._transfer.destroy()


def _until(deadline: float) -> float:
    """Seconds that are left."""
    return max(deadline - time.monotonic(), 0.0)


def _needs_anchor(report: HotloadReport) -> bool:
    return any(isinstance(replica.error, NoPath) for replica in report.replicas)


def _missed(report: HotloadReport) -> HubsyncError:
    """Names every server that is missing, and why. Of one server, its own error."""
    missing = [replica for replica in report.replicas if replica.commit is None]
    if len(report.replicas) == 1 and missing[0].error is not None:
        return missing[0].error
    why = "; ".join(f"{replica.url}: {replica.error}" for replica in missing)
    served = f"{len(report.commits)} of {len(report.replicas)} servers serve {report.position}"
    return ReplicaError(
        f"{served}, and {report.needed} must. {why}. Restart the missing servers, or set a smaller quorum"
    )


class VersionMap:
    """Which of TRL's versions a version of the run is. TRL counts synchronisations; a run counts changes."""

    def __init__(self) -> None:
        self._run: list[int] = []
        self._trl: list[int] = []

    def note(self, trl_version: int, run_version: int) -> None:
        """The policy of TRL's version, the newest so far, is published as `run_version`."""
        if self._run and self._run[-1] == run_version:
            self._trl[-1] = trl_version  # nothing had changed
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
