"""The trainer's door: publish the weights of a model after optimizer steps, and bring servers to them."""

from __future__ import annotations

import json
import logging
import operator
import os
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download

from hubsync.bucket import Bucket, open_bucket
from hubsync.chain import ChainWriter, Layout
from hubsync.checkpoint import Checkpoint
from hubsync.digest import Digest, digest_view
from hubsync.errors import ConfigError, HubsyncError, NoPath, RunMismatch
from hubsync.manifest import Base, Manifest, Position, Run
from hubsync.table import TensorTable

from .config import VIEW_DTYPES, SyncConfig
from .detection import Detected, Snapshot, live_tensors, published_tensors, table_of
from .division import divided
from .joint import JointWriter
from .level import LevelChooser
from .publisher import Published, Publisher, Ticket
from .ranks import Ranks, join
from .shards import Shard

if TYPE_CHECKING:
    from hubsync.replica.sync import CommitReport, Replica

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncReport:
    """What `DeltaWeightTransferEngine.sync` or `.deliver` did.

    Attributes:
        published: the version, or the current one if nothing had changed.
        commits: one report for each of `SyncConfig.servers`, in their order.
        sync_s: seconds from the call of `deliver` until every server had committed.
    """

    published: Published
    commits: tuple[CommitReport, ...]
    sync_s: float


class DeltaWeightTransferEngine:
    """Publishes a model's weights to a bucket, as deltas, and commits them on inference servers.

    The constructor copies the published view, and creates the run or continues it. Under torch.distributed every rank
    makes an engine and calls the same methods in the same order: each finds, encodes and uploads the changes of what it
    owns, and what one rank raises all raise. See docs/trainers.md.

    Attributes:
        config: what it was made with.
        ranks: the processes that train the model together.
        steps: optimizer steps seen.

    Args:
        model: the model being trained. It is only ever read.
        optimizer: its optimizer, whose steps are counted (`publish` without a step then records that count); None if
            you tell the step yourself. A wrapper of accelerate is unwrapped.
        config: see [`SyncConfig`].
        processing_class: tokenizer or processor to store beside the weights of anchors.

    Raises:
        ConfigError: a model or setting that cannot work.
        RunMismatch: the bucket holds a run of another model, or one at all although `config.resume` is False.
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
    ):
        self.config = config
        self.steps = 0
        self.ranks = join()
        self._model = model = _without_wrapper(model)
        self._processing_class = processing_class
        self._replicas: list[Replica] = []
        self._closed = False
        self._process = os.getpid()
        self._publishing = threading.Lock()
        view_dtype = VIEW_DTYPES[config.view_dtype]
        tensors = self.ranks.together(lambda: published_tensors(model))
        optimizer = self.ranks.together(lambda: _torch_optimizer(optimizer))
        _warn_of_lost_updates(tensors, view_dtype)
        division = divided(self.ranks, tensors, view_dtype)
        level = self.ranks.together(lambda: LevelChooser(_level_for(self.ranks, config.encoding)))
        bucket = self.ranks.together(lambda: open_bucket(config.bucket, create=True, token=config.token))
        own, table = division[self.ranks.rank], table_of(tensors, view_dtype)
        snapshot = self.ranks.together(lambda: Snapshot(tensors, table, config.snapshot_device, own))
        self._publisher = self._join(bucket, snapshot, level, division)
        self._hook = None if optimizer is None else optimizer.register_step_post_hook(self._count_step).remove

    # --- what users call ----------------------------------------------------------------------------

    @property
    def position(self) -> Position:
        """The newest durable version and its digest."""
        return self._publisher.writer.position

    @property
    def run(self) -> Run:
        return self._publisher.writer.run

    def publish(self, step: int | None = None, name: str | None = None) -> Ticket:
        """Find what has changed since the last durable version, and make it the next one in the background.

        Returns after detection: the model may be trained on at once. If nothing changed, no version is made. If the
        publish before is still under way, this one waits for it, and raises its error if nobody has seen it yet;
        the changes are not lost then, the next call publishes them.

        Args:
            step: the trainer's step, recorded with the version; default is the number of optimizer steps seen.
            name: free text recorded with the version; default is `config.name`.
        """
        self._require_open()
        step = self.steps if step is None else int(operator.index(step))  # also numpy's and torch's integers
        with self._publishing:
            self._publisher.begin()
            detected, changed, detect_s = self._detect()
            if not changed:
                return self._publisher.unchanged(step, detect_s)
            return self._publisher.submit(detected, step, name or self.config.name, detect_s)

    def _detect(self) -> tuple[Detected, bool, float]:
        """What has changed of this rank's part, whether anything has on any rank, and this rank's seconds."""
        found: list[tuple[Detected, float]] = []

        def detect() -> bool:
            started = time.perf_counter()
            snapshot = self._publisher.snapshot
            snapshot.follow(live_tensors(self._model))
            detected = snapshot.detect()
            found.append((detected, time.perf_counter() - started))
            return bool(detected.changes)

        changed = any(self.ranks.gather(detect))
        detected, detect_s = found[0]
        return detected, changed, detect_s

    def sync(self, step: int | None = None, name: str | None = None) -> SyncReport:
        """`publish`, then `deliver`."""
        return self.deliver(self.publish(step, name))

    def deliver(self, ticket: Ticket) -> SyncReport:
        """Wait until a publish is durable, and commit its version on every server of the config.

        A server that fails does not keep the others from the new version; its error is raised after they have it.
        Rank 0 speaks to the servers; the others wait for the outcome.
        """
        started = time.perf_counter()
        published = ticket.result()
        try:
            commits = self.ranks.first(lambda: self._commit_everywhere(published.position))
        except NoPath as no_path:
            logger.warning("uploading the whole model, because a server has no other way to it: %s", no_path)
            self.anchor()
            commits = self.ranks.first(lambda: self._commit_everywhere(published.position))
        return SyncReport(published, commits, time.perf_counter() - started)

    def wait(self) -> None:
        """Wait until nothing is under way; raises the error of the last publish unless its ticket has."""
        self._publisher.wait()

    def anchor(self) -> Manifest:
        """Upload the whole model as it was last published, loadable by `from_pretrained` and `vllm serve`."""
        self._require_open()
        with self._publishing:
            self._publisher.begin()
            return self._publisher.anchor(step=self.steps, name=self.config.name)

    def close(self) -> None:
        """Wait for the publish under way and stop. Raises its error unless its ticket has; closing twice is fine."""
        self._close(anchor=self.config.anchor_at_close)

    def _close(self, *, anchor: bool) -> None:
        if self._closed:
            return
        try:
            self._publisher.wait()
            if anchor:
                self.anchor()
        finally:
            self._closed = True
            if self._hook is not None:
                self._hook()
            self._publisher.close()
            for replica in self._replicas:
                replica.server.close()

    def __enter__(self) -> DeltaWeightTransferEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A rank that leaves with an error leaves alone: the others are elsewhere, and cannot join it in an anchor.
        alone = error is not None and self.ranks.size > 1
        try:
            self._close(anchor=self.config.anchor_at_close and not alone)
        except Exception:
            if error is None:
                raise
            logger.exception("while closing after another error")  # the first error is the one to see

    # --- joining the run ----------------------------------------------------------------------------

    def _join(self, bucket: Bucket, snapshot: Snapshot, level: LevelChooser, division: list[list[Shard]]) -> Publisher:
        digest = sum(self.ranks.gather(lambda: snapshot.digest), Digest())
        writer = JointWriter(bucket, self.ranks, lambda: self._open_writer(bucket, snapshot.table, digest))
        publisher = Publisher(
            writer,
            snapshot,
            self._write_side_files,
            level,
            self.config.anchor_every,
            self._announce,
            self.ranks,
            division,
        )
        if writer.position.digest != digest.hex:
            logger.warning(
                "the model is not at the run's newest %s: uploading it whole, the run goes on from there",
                writer.position,
            )
            publisher.anchor(Position(writer.next_version, digest.hex), name=self.config.name)
        elif writer.newest is None and writer.run.base.model is None:
            publisher.anchor()  # also if whoever created the run died before it could
        return publisher

    def _open_writer(self, bucket: Bucket, table: TensorTable, digest: Digest) -> ChainWriter:
        if bucket.read([Layout.RUN]):
            if not self.config.resume:
                raise RunMismatch(
                    f"{bucket.address} already holds a run, and resume is False: choose another prefix for a new run"
                )
            return ChainWriter.resume(bucket, table)
        run = Run(
            run_id=secrets.token_hex(16),
            table=table,
            digest=digest.hex,
            base=_base_of(self._model, self.config, table, digest),
            created=time.time(),
        )
        return ChainWriter.create(bucket, run)

    def _write_side_files(self, directory: Path) -> None:
        model: Any = self._model
        owners = [getattr(model, "config", None), getattr(model, "generation_config", None), self._processing_class]
        for owner in owners:
            if hasattr(owner, "save_pretrained"):
                owner.save_pretrained(directory)
        self._describe_view(directory / "config.json")

    def _describe_view(self, path: Path) -> None:
        """A config tells of the model in training; let it tell of the view: its dtype, and the class that loads it."""
        if not path.exists():
            return
        config = json.loads(path.read_text())
        parts = [config, *(part for part in config.values() if isinstance(part, dict))]
        for part in parts:
            part.update({key: self.config.view_dtype for key in ("dtype", "torch_dtype") if key in part})
        config["dtype"] = self.config.view_dtype
        config["architectures"] = config.get("architectures") or [_class_of(self._model).__name__]
        path.write_text(json.dumps(config, indent=2) + "\n")

    def _count_step(self, *_: Any) -> None:
        self.steps += 1

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigError("this engine is closed: make a new one, it continues the run")
        if os.getpid() != self._process:
            raise ConfigError("this engine belongs to the process that this one was forked from: publish there")

    # --- servers ------------------------------------------------------------------------------------

    def _announce(self, position: Position) -> None:
        """Have the servers stage a durable version while the training goes on. `deliver` asks again if this fails."""
        for replica in self._replicas:
            try:
                replica.stage(position)
            except HubsyncError as error:
                logger.debug("not staged yet: %s", error)

    def _commit_everywhere(self, position: Position) -> tuple[CommitReport, ...]:
        if not self.config.servers:
            return ()
        if not self._replicas:
            self._replicas = _replicas(self.config)
        with ThreadPoolExecutor(len(self._replicas), thread_name_prefix="hubsync-commit") as threads:
            # All downloads run side by side, and no server waits for a slower one.
            futures = [threads.submit(self._commit_on, replica, position) for replica in self._replicas]
        return tuple(future.result() for future in futures)

    def _commit_on(self, replica: Replica, position: Position) -> CommitReport:
        if replica.status().position is None:
            replica.attach(self.config.stage_timeout)
        replica.wait_staged(position, self.config.stage_timeout)
        return replica.commit(position)


def _torch_optimizer(optimizer: Any) -> Any:
    if optimizer is None:
        return None
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper takes no hooks
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "register_step_post_hook"):
        raise ConfigError(f"{type(optimizer).__name__} is not a torch optimizer: pass that, or None")
    return optimizer


def _replicas(config: SyncConfig) -> list[Replica]:
    from hubsync.replica.server import VLLMServer
    from hubsync.replica.sync import Replica

    replicas = [Replica(VLLMServer(url, timeout=config.commit_timeout), config.kv_cache) for url in config.servers]
    for replica in replicas:
        replica.check()
    return replicas


def _base_of(model: torch.nn.Module, config: SyncConfig, table: TensorTable, digest: Digest) -> Base:
    """Where inference servers find version 0: what the user says, else what the model's config says.

    Nowhere, if that is not what the model holds now: it may have been trained since, or loaded from elsewhere.
    """
    base = _stated_base(model, config)
    directory = None if base.model is None else _local_copy(base)
    if directory is None:
        return base
    try:
        checkpoint = Checkpoint(directory, table)
        checkpoint.check()
        holds = digest_view(table, checkpoint) == digest
    except ConfigError:  # a tensor is missing, or has another shape
        holds = False
    if holds:
        return base
    logger.warning("the model does not hold the weights of %s: uploading it whole as version 0", base.model)
    return Base()


def _stated_base(model: torch.nn.Module, config: SyncConfig) -> Base:
    if config.base_model is not None:
        return Base(config.base_model, config.base_revision)
    source: Any = getattr(model, "config", None)
    name = getattr(source, "_name_or_path", None) or None
    if name is None:
        return Base()
    if Path(name).is_dir():
        return Base(str(Path(name).resolve()))
    commit = getattr(source, "_commit_hash", None)
    return Base(name, commit) if commit is not None else Base()


def _local_copy(base: Base) -> Path | None:
    """Directory of the base checkpoint, if it is on this machine."""
    if base.model is not None and Path(base.model).is_dir():
        return Path(base.model)
    try:
        return Path(snapshot_download(str(base.model), revision=base.revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or not the name of a repository
        return None


def _warn_of_lost_updates(tensors: dict[str, torch.Tensor], view_dtype: torch.dtype) -> None:
    narrow = {tensor.dtype for tensor in tensors.values() if tensor.requires_grad and tensor.element_size() < 4}
    if narrow:
        logger.warning(
            "the trained parameters are %s: updates smaller than half a unit in the last place are lost. Train with "
            "float32 parameters (and autocast); hubsync casts them to %s for inference",
            " and ".join(sorted(map(str, narrow))),
            view_dtype,
        )


def _without_wrapper(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel: it has the config that describes it."""
    while isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def _class_of(model: torch.nn.Module) -> type:
    """The class that loads it: `fully_shard` changes a model's class to one of its own."""
    from torch.distributed.fsdp import FSDPModule  # takes a second

    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def _level_for(ranks: Ranks, encoding: str) -> str:
    if ranks.size == 1:
        return encoding
    if encoding == "compact":
        raise ConfigError(
            "encoding='compact' needs all old weights of a tensor in one process, and here several ranks share them: "
            "use encoding='fast' (or 'auto', which is that)"
        )
    return "fast"
