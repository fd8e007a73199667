"""The trainer's door: publish the weights of a model after optimizer steps, and bring servers to them."""

from __future__ import annotations

import json
import logging
import operator
import os
import secrets
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download

from hubsync.bucket import Bucket, open_bucket
from hubsync.chain import ChainReader, ChainWriter, Layout
from hubsync.checkpoint import Checkpoint
from hubsync.digest import digest_view
from hubsync.errors import BucketError, ConfigError, FormatError, NoPath, RunMismatch
from hubsync.manifest import Base, Manifest, Position, Run
from hubsync.patch import Patch, invert
from hubsync.weights import ViewBits, digest_after

from .config import VIEW_DTYPES, SyncConfig
from .detection import Snapshot, live_tensors, published_tensors, table_of
from .level import LevelChooser
from .publisher import Published, Publisher, Ticket

if TYPE_CHECKING:
    from hubsync.replica.deployment import Deployment, HotloadReport, ReplicaReport
    from hubsync.replica.sync import CommitReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncReport:
    """What `DeltaWeightTransferEngine.sync` or `.deliver` did.

    Attributes:
        published: the version, or the current one if nothing had changed.
        commits: reports of the servers that have committed, in the order of `SyncConfig.servers`: of all of them,
            unless `SyncConfig.quorum` lets some come later.
        sync_s: seconds from the call of `deliver` until they had.
        replicas: what is known of each of `SyncConfig.servers`.
    """

    published: Published
    commits: tuple[CommitReport, ...]
    sync_s: float
    replicas: tuple[ReplicaReport, ...] = ()


class DeltaWeightTransferEngine:
    """Publishes a model's weights to a bucket, as deltas, and commits them on inference servers.

    The constructor copies the published view, and creates the run or continues it. In distributed data parallel
    training make the engine on rank 0 only.

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
        _require_one_publisher()
        self.config = config
        self.steps = 0
        self._model = model
        self._processing_class = processing_class
        self._deployment = _deployment(config)
        self._closed = False
        self._process = os.getpid()
        self._publishing = threading.Lock()
        view_dtype = VIEW_DTYPES[config.view_dtype]
        tensors = published_tensors(model)
        _warn_of_lost_updates(tensors, view_dtype)
        optimizer = _torch_optimizer(optimizer)
        bucket = open_bucket(config.bucket, create=True, token=config.token)
        snapshot = Snapshot(tensors, table_of(tensors, view_dtype), config.snapshot_device)
        self._publisher = self._join(bucket, snapshot)
        self._hook = None if optimizer is None else optimizer.register_step_post_hook(self._count_step).remove

    # --- what users call ----------------------------------------------------------------------------

    @property
    def position(self) -> Position:
        """The newest durable version and its digest."""
        return self._publisher.writer.position

    @property
    def run(self) -> Run:
        return self._publisher.writer.run

    def publish(self, step: int | None = None, name: str | None = None, *, serve: bool = True) -> Ticket:
        """Find what has changed since the last durable version, and make it the next one in the background.

        Returns after detection: the model may be trained on at once. If nothing changed, no version is made. If the
        publish before is still under way, this one waits for it, and raises its error if nobody has seen it yet;
        the changes are not lost then, the next call publishes them.

        Args:
            step: the trainer's step, recorded with the version; default is the number of optimizer steps seen.
            name: free text recorded with the version; default is `config.name`.
            serve: whether replicas that follow the run are to serve the version; else it is only saved, for `serve`.
        """
        self._require_open()
        step = self.steps if step is None else int(operator.index(step))  # also numpy's and torch's integers
        with self._publishing:
            self._publisher.wait()
            self._publisher.settle()
            started = time.perf_counter()
            self._publisher.snapshot.follow(live_tensors(self._model))
            detected = self._publisher.snapshot.detect()
            detect_s = time.perf_counter() - started
            if detected.changes:
                return self._publisher.submit(detected, step, name or self.config.name, detect_s, serve)
            if serve and self._publisher.writer.serving != self.position.version:
                self._publisher.writer.serve(self.position.version)
            return self._publisher.unchanged(step, detect_s)

    def serve(self, version: int) -> Position:
        """Let replicas that follow the run serve a committed version: an older one, or one that was only saved.

        The training goes on where it is: the next version follows the newest one, not this. ChainError if the version
        does not exist.
        """
        self._require_open()
        with self._publishing:
            self._publisher.wait()
            self._publisher.settle()
            return self._publisher.writer.serve(version)

    def sync(self, step: int | None = None, name: str | None = None) -> SyncReport:
        """`publish`, then `deliver`."""
        return self.deliver(self.publish(step, name))

    def deliver(self, ticket: Ticket) -> SyncReport:
        """Wait until a publish is durable, and commit its version on every server of the config.

        A server that fails does not keep the others from the new version; its error is raised after they have it.
        """
        started = time.perf_counter()
        published = ticket.result()
        if self._deployment is None:
            return SyncReport(published, (), time.perf_counter() - started)
        report = self._hotload(self._deployment, published.position)
        report.raise_for_quorum()
        return SyncReport(published, report.commits, time.perf_counter() - started, report.replicas)

    def wait(self) -> None:
        """Wait until nothing is under way; raises the error of the last publish unless its ticket has."""
        self._publisher.wait()

    def anchor(self, name: str | None = None) -> Manifest:
        """Upload the whole model as it was last published, loadable by `from_pretrained` and `vllm serve`.

        Args:
            name: free text recorded with it; default is `config.name`.
        """
        self._require_open()
        with self._publishing:
            self._publisher.wait()
            self._publisher.settle()
            return self._publisher.anchor(step=self.steps, name=name or self.config.name)

    def close(self) -> None:
        """Wait for the publish under way and stop. Raises its error unless its ticket has; closing twice is fine."""
        if self._closed:
            return
        try:
            self._publisher.wait()
            if self.config.anchor_at_close:
                self.anchor()
        finally:
            self._closed = True
            if self._hook is not None:
                self._hook()
            self._publisher.close()
            if self._deployment is not None:
                self._deployment.close()

    def __enter__(self) -> DeltaWeightTransferEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise
            logger.exception("while closing after another error")  # the first error is the one to see

    # --- joining the run ----------------------------------------------------------------------------

    def _join(self, bucket: Bucket, snapshot: Snapshot) -> Publisher:
        if bucket.read([Layout.RUN]):
            return self._resume(bucket, snapshot)
        run = Run(
            run_id=secrets.token_hex(16),
            table=snapshot.table,
            digest=snapshot.digest.hex,
            base=_base_of(self._model, self.config, snapshot),
            created=time.time(),
        )
        publisher = self._new_publisher(ChainWriter.create(bucket, run), snapshot)
        if run.base.model is None:
            publisher.anchor()
        return publisher

    def _resume(self, bucket: Bucket, snapshot: Snapshot) -> Publisher:
        if not self.config.resume:
            raise RunMismatch(
                f"{bucket.address} already holds a run, and resume is False: choose another prefix for a new run"
            )
        publisher = self._new_publisher(ChainWriter.resume(bucket, snapshot.table), snapshot)
        writer = publisher.writer
        if writer.position.digest == snapshot.digest.hex:
            if writer.newest is None and writer.run.base.model is None:
                publisher.anchor()  # whoever created the run died before it could
        elif (patch := _way_back(bucket, writer.position, snapshot)) is not None:
            publisher.publish_patch(patch, snapshot.digest.hex, name=self.config.name)
            logger.info("the model is at an older version of the run: it is %s now, made by a delta", writer.position)
        else:
            logger.warning(
                "the model is not at the run's newest %s: uploading it whole, the run goes on from there",
                writer.position,
            )
            publisher.anchor(Position(writer.next_version, snapshot.digest.hex), name=self.config.name)
        return publisher

    def _new_publisher(self, writer: ChainWriter, snapshot: Snapshot) -> Publisher:
        level = LevelChooser(self.config.encoding)
        return Publisher(writer, snapshot, self._write_side_files, level, self.config.anchor_every, self._announce)

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
        config["architectures"] = config.get("architectures") or [type(self._model).__name__]
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
        if self._deployment is not None:
            self._deployment.signal(position)

    def _hotload(self, deployment: Deployment, position: Position) -> HotloadReport:
        report = deployment.hotload(position, timeout=self.config.stage_timeout)
        no_path = next((replica.error for replica in report.replicas if isinstance(replica.error, NoPath)), None)
        if no_path is None:
            return report
        logger.warning("uploading the whole model, because a server has no other way to it: %s", no_path)
        self.anchor()
        return deployment.hotload(position, timeout=self.config.stage_timeout)


def _way_back(bucket: Bucket, newest: Position, snapshot: Snapshot) -> Patch | None:
    """What leads from the run's newest version back to the snapshot's, if that is an older one of the same chain."""
    with tempfile.TemporaryDirectory(prefix="hubsync-") as cache:
        reader = ChainReader(bucket, cache)
        try:
            older = reader.find(snapshot.digest.hex)
            if older is None:
                return None
            # Forwards, from weights that are at hand: so compact deltas can be read, too.
            plan = reader.plan(older, to=newest.version)
            if plan.start is None or plan.target != newest:
                return None
            patch = reader.merged(plan.steps, ViewBits(snapshot.table, snapshot.tensors()))
        except (BucketError, FormatError, NoPath) as error:
            logger.warning("the deltas from the model's version on cannot be read: %s", error)
            return None
    if digest_after(snapshot.table, snapshot.tensors(), snapshot.digest, patch).hex != newest.digest:
        logger.warning("the deltas from %s do not lead to %s", older, newest)
        return None
    return invert(patch)


def _torch_optimizer(optimizer: Any) -> Any:
    if optimizer is None:
        return None
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper takes no hooks
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "register_step_post_hook"):
        raise ConfigError(f"{type(optimizer).__name__} is not a torch optimizer: pass that, or None")
    return optimizer


def _deployment(config: SyncConfig) -> Deployment | None:
    if not config.servers:
        return None
    from hubsync.replica.deployment import Deployment

    return Deployment(
        config.servers, kv_cache=config.kv_cache, quorum=config.quorum, request_timeout=config.commit_timeout
    )


def _base_of(model: torch.nn.Module, config: SyncConfig, snapshot: Snapshot) -> Base:
    """Where inference servers find version 0: what the user says, else what the model's config says.

    Nowhere, if that is not what the model holds now: it may have been trained since, or loaded from elsewhere.
    """
    base = _stated_base(model, config)
    directory = None if base.model is None else _local_copy(base)
    if directory is None:
        return base
    try:
        checkpoint = Checkpoint(directory, snapshot.table)
        checkpoint.check()
        holds = digest_view(snapshot.table, checkpoint) == snapshot.digest
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


def _require_one_publisher() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0:
        raise ConfigError("several ranks cannot publish the same run: make the engine on rank 0 only")
