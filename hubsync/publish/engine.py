"""Trainer entry point: publish a model's weights after optimizer steps, and commit them on inference servers."""

from __future__ import annotations

import logging
import operator
import os
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from hubsync.bucket import open_bucket
from hubsync.chain import VersionInfo
from hubsync.errors import ConfigError, NoPath
from hubsync.format.digest import Digest
from hubsync.format.encoding import Encoding
from hubsync.format.keys import SIGNING_KEY_VARIABLE, SigningKey
from hubsync.format.manifest import Manifest, Position, Run
from hubsync.publish.detect.choose import choose_detector
from hubsync.publish.view.cuts import CutView, Layout
from hubsync.publish.view.division import divided, holds_all
from hubsync.publish.view.live import LiveView, PublishedView, table_of

from .anchors import Anchors
from .config import SyncConfig
from .joining import bring_to_model, open_writer, stated_in_run
from .publisher import Publisher
from .rank_writer import JointWriter
from .ranks import Ranks, join
from .results import SyncReport, Ticket
from .trained_model import TrainedModel, torch_optimizer, warn_of_lost_updates, warn_of_unpublished, without_wrapper

if TYPE_CHECKING:
    from hubsync.replicas.deployment import Deployment, HotloadReport

logger = logging.getLogger(__name__)

_LONGEST_TTL_S = 100 * 365 * 86400.0  # a longer one means never: leave it out


class DeltaWeightTransferEngine:
    """Publishes a model's weights to a bucket, as deltas, and commits them on inference servers.

    The constructor reads the published view and creates or continues the run. With `detector="snapshot"` it keeps a
    copy of the view. Otherwise it makes the optimizer step a few parameters at a time, until `close`.

    Under torch.distributed every rank makes an engine and calls the same methods in the same order. Each rank detects,
    encodes and uploads the changes of the elements that it owns. An error of one rank is raised on all ranks. See
    docs/trainers.md.

    Attributes:
        config: the settings.
        ranks: the processes that train the model together.
        steps: optimizer steps seen.

    Args:
        model: the model being trained. It is only read.
        optimizer: its optimizer; the engine counts its steps, and `publish` records the count by default. None if you
            pass the step yourself. A wrapper of accelerate is unwrapped.
        config: see [`SyncConfig`].
        processing_class: tokenizer or processor to store with the weights of anchors.
        layout: for a trainer that cuts parameters itself, such as Megatron-Core: called with `model` at every publish,
            it gives what this rank holds of the published tensors, as [`Cut`][hubsync.publish.view.cuts.Cut]s. Default
            is to find the published tensors in the model.

    Raises:
        ConfigError: the model or a setting cannot work.
        RunMismatch: the bucket holds a run of another model, or any run although `config.resume` is False.
        BucketError: the bucket cannot be opened, read or written.
        RankError: another rank has ended.

    Usage:

    ```python
    >>> from hubsync import DeltaWeightTransferEngine, SyncConfig

    >>> config = SyncConfig(bucket="hf://buckets/me/rl/run1", servers=["http://localhost:8000"])
    >>> with DeltaWeightTransferEngine(model, optimizer, config) as engine:
    ...     for step, batch in enumerate(batches):
    ...         train(batch)
    ...         engine.sync(step)
    ```
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        config: SyncConfig,
        *,
        processing_class: Any = None,
        layout: Layout | None = None,
    ):
        self.config = config
        self.steps = 0
        self.ranks = join()
        self._closed = False
        self._deployment = _deployment(config)
        module = without_wrapper(model)
        view = self.ranks.together(lambda: _view(model, module, config, layout))
        view.complete(self.ranks.gather(view.described))
        tensors = self.ranks.together(view.tensors)
        stepped = self.ranks.together(lambda: torch_optimizer(optimizer))
        trained = self.ranks.together(lambda: TrainedModel(module, config, processing_class))
        if layout is None:  # else masters may be elsewhere
            warn_of_lost_updates(tensors, config.dtype)
        warn_of_unpublished(module, optimizer)
        self._publisher = self._joined(view, tensors, optimizer, trained)
        self._hook = None if stepped is None else stepped.register_step_post_hook(self._count_step).remove

    def _joined(
        self, view: PublishedView, tensors: dict[str, torch.Tensor], optimizer: Any, model: TrainedModel
    ) -> Publisher:
        """The publisher of this rank, after the run holds the model's weights."""
        config, ranks = self.config, self.ranks
        key = ranks.together(lambda: _signing_key(config))
        division = divided(ranks, tensors, config.dtype)
        ranks.together(lambda: _require_encoding(config, ranks))
        bucket = ranks.together(lambda: open_bucket(config.bucket, create=True, token=config.token, key=key))
        in_run = ranks.first(lambda: stated_in_run(bucket, config.dtype))
        stated = in_run or ranks.first(lambda: model.stated(tensors))
        if ranks.together(lambda: view.lay_out(stated.shapes)):
            tensors = ranks.together(view.tensors)
            division = divided(ranks, tensors, config.dtype)
            stated = in_run or ranks.first(lambda: model.stated(tensors))  # under the names that they have now
        table, has_adapter = table_of(tensors, config.dtype, stated.kept), model.adapter is not None
        shards = None if holds_all(ranks, tensors) else division.owned[ranks.rank]
        detector = ranks.together(
            lambda: choose_detector(tensors, table, optimizer, config, shards=shards, has_adapter=has_adapter)
        )
        try:
            digest = sum(ranks.gather(lambda: detector.digest), Digest())
            writer = JointWriter(bucket, ranks, lambda: open_writer(bucket, model, table, digest, key, config.resume))
            anchors = Anchors(writer, detector, model, division, config)
            publisher = Publisher(writer, view, detector, anchors, ranks, config, self._deployment)
            bring_to_model(publisher, digest, config.name)
        except BaseException:
            detector.close()
            raise
        return publisher

    @property
    def position(self) -> Position:
        """The newest durable version and its digest."""
        return self._publisher.writer.position

    @property
    def run(self) -> Run:
        return self._publisher.writer.run

    def publish(
        self, step: int | None = None, name: str | None = None, *, serve: bool = True, ttl: float | None = None
    ) -> Ticket:
        """Detect the changes since the last durable version, and publish them as the next version in the background.

        Returns after detection: training may continue at once. If nothing changed, no version is made. If the previous
        publish is still under way, this one waits for it, and raises its error unless its ticket has. The changes of a
        failed publish are not lost: the next call publishes them.

        Args:
            step: the trainer's step, recorded with the version; default is the number of optimizer steps seen.
            name: free text recorded with the version; default is `config.name`.
            serve: whether replicas that follow the run serve the version. Otherwise it is only saved, until `serve`.
            ttl: seconds after which `hubsync gc` may delete the version, unless it is the newest, is served, or other
                versions depend on it; default is never, except by the policy of `gc`.
        """
        self._require_open()
        expires = _expiry(ttl)
        step = self.steps if step is None else int(operator.index(step))  # also numpy's and torch's integers
        return self._publisher.publish(VersionInfo(step, name or self.config.name, serve, expires))

    def serve(self, version: int) -> Position:
        """Let replicas that follow the run serve a committed version: an older one, or one that was only saved.

        Training is not affected: the next version follows the newest one, not this one. ChainError if the version does
        not exist.
        """
        self._require_open()
        return self._publisher.serve(version)

    def sync(self, step: int | None = None, name: str | None = None) -> SyncReport:
        """`publish`, then `deliver`."""
        return self.deliver(self.publish(step, name))

    def deliver(self, ticket: Ticket) -> SyncReport:
        """Wait until a publish is durable, and commit its version on every server of the config.

        A server that fails does not keep the others from the new version; its error is raised after they have
        committed. Rank 0 calls the servers, and the other ranks wait for the outcome.
        """
        started = time.perf_counter()
        published = ticket.result()
        report = self._hotload(published.position)
        if report is None:
            return SyncReport(published, (), time.perf_counter() - started)
        self.ranks.together(report.raise_for_quorum)
        return SyncReport(published, report.commits, time.perf_counter() - started, report.replicas)

    def wait(self) -> None:
        """Wait for the publish under way. Raises its error, unless its ticket has."""
        self._publisher.wait()

    def anchor(self, name: str | None = None) -> Manifest:
        """Upload the whole model as it was last published, loadable by `from_pretrained` and `vllm serve`.

        Args:
            name: free text recorded with it; default is `config.name`.
        """
        self._require_open()
        return self._publisher.anchor(VersionInfo(self.steps, name or self.config.name))

    def close(self) -> None:
        """Wait for the publish under way, and stop. Raises its error, unless its ticket has. May be called twice."""
        self._close(anchor=self.config.anchor_at_close)

    def __enter__(self) -> DeltaWeightTransferEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A rank that leaves with an error leaves alone: the other ranks cannot join it in an anchor.
        alone = error is not None and self.ranks.size > 1
        try:
            self._close(anchor=self.config.anchor_at_close and not alone)
        except Exception:
            if error is None:
                raise
            logger.exception("while closing after another error")  # the first error is the one to raise

    def _close(self, *, anchor: bool) -> None:
        if self._closed:
            return
        try:
            self._publisher.finish(VersionInfo(self.steps, self.config.name), anchor)
        finally:
            self._closed = True
            if self._hook is not None:
                self._hook()
            self._publisher.close()
            if self._deployment is not None:
                self._deployment.close()

    def _count_step(self, *_: Any) -> None:
        self.steps += 1

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigError("this engine is closed: make a new one, it continues the run")

    def _hotload(self, position: Position) -> HotloadReport | None:
        """Commit a version on the servers, by rank 0; the other ranks get its report. None if there are no servers."""
        deployment, timeout = self._deployment, self.config.stage_timeout
        if deployment is None:
            return None
        report = self.ranks.first(lambda: deployment.hotload(position, timeout=timeout))
        no_path = next((replica.error for replica in report.replicas if isinstance(replica.error, NoPath)), None)
        if no_path is None:
            return report
        logger.warning("uploading the whole model, because a server has no other path to it: %s", no_path)
        self.anchor()
        return self.ranks.first(lambda: deployment.hotload(position, timeout=timeout))


def _view(model: Any, module: torch.nn.Module, config: SyncConfig, layout: Layout | None) -> PublishedView:
    return LiveView(module, config.dtype) if layout is None else CutView(layout, model)


def _expiry(ttl: float | None) -> float | None:
    """Seconds since 1970, by this machine's clock."""
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not 0 <= ttl < _LONGEST_TTL_S:
        raise ConfigError(f"ttl must be a number of seconds, or None for never, not {ttl!r:.80}")
    return time.time() + ttl


def _signing_key(config: SyncConfig) -> SigningKey | None:
    source = os.environ.get(SIGNING_KEY_VARIABLE) if config.signing_key is None else config.signing_key
    return None if source is None else SigningKey.load(source)


def _deployment(config: SyncConfig) -> Deployment | None:
    if not config.servers:
        return None
    from hubsync.replicas.deployment import Deployment

    return Deployment(
        config.servers,
        kv_cache=config.kv_cache,
        api_key=config.api_key,
        quorum=config.quorum,
        request_timeout=config.commit_timeout,
    )


def _require_encoding(config: SyncConfig, ranks: Ranks) -> None:
    if ranks.size > 1 and Encoding(config.encoding).needs_base:
        raise ConfigError(
            f"encoding='{config.encoding}' needs all old weights of a tensor in one process, and here several ranks "
            "share them: use encoding='fast'"
        )
