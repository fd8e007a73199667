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
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from hubsync.bucket import Bucket, open_bucket
from hubsync.chain import ChainReader, ChainWriter, Layout, VersionInfo
from hubsync.errors import BucketError, ConfigError, FormatError, NoPath, RunMismatch
from hubsync.format.checkpoint import Checkpoint
from hubsync.format.digest import Digest, digest_view
from hubsync.format.encoding import Encoding
from hubsync.format.keys import SIGNING_KEY_VARIABLE, SigningKey
from hubsync.format.manifest import Adapter, Base, Manifest, Position, Run
from hubsync.format.parts import write_adapter_config
from hubsync.format.patch import Patch, invert
from hubsync.format.table import TensorTable
from hubsync.format.view_bits import ViewBits, digest_after
from hubsync.publish.detect.base import Detected, Detector
from hubsync.publish.detect.sliced import choose_detector
from hubsync.publish.detect.snapshot import Snapshot
from hubsync.publish.detect.stepping import unwrapped
from hubsync.publish.view.adapters import adapter_config, base_digest, is_adapted, require_same_adapter
from hubsync.publish.view.deepspeed import is_deepspeeds, steps_masters
from hubsync.publish.view.division import divided
from hubsync.publish.view.live import LiveView, table_of
from hubsync.publish.view.shards import Shard
from hubsync.publish.view.strided import whole_of

from .base_copy import copy_base, local_copy
from .compaction import BackgroundCompactor
from .config import VIEW_DTYPES, SyncConfig
from .publisher import Published, Publisher, Ticket
from .rank_writer import JointWriter
from .ranks import Ranks, join

if TYPE_CHECKING:
    from hubsync.replicas.deployment import Deployment, HotloadReport, ReplicaReport
    from hubsync.replicas.replica import CommitReport

logger = logging.getLogger(__name__)

_LONGEST_TTL_S = 100 * 365 * 86400.0  # longer is never: leave it out


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

    The constructor reads the published view, and creates the run or continues it. With `detector="snapshot"` it keeps a
    copy of the view; else it has the optimizer step a few parameters at a time, until `close`. Under torch.distributed
    every rank makes an engine and calls the same methods in the same order: each finds, encodes and uploads the changes
    of what it owns, and what one rank raises all raise. See docs/trainers.md.

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
        self._deployment = _deployment(config)
        self._closed = False
        self._process = os.getpid()
        self._publishing = threading.Lock()
        view_dtype = VIEW_DTYPES[config.view_dtype]
        self._view = self.ranks.together(lambda: LiveView(model))
        tensors = self.ranks.together(self._view.tensors)
        stepped = self.ranks.together(lambda: _torch_optimizer(optimizer))
        self._adapter = self.ranks.together(lambda: _adapter_of(model, config, view_dtype))
        _warn_of_lost_updates(tensors, view_dtype)
        _warn_of_unpublished(model, optimizer)
        self._key = self.ranks.together(lambda: _signing_key(config))
        division = divided(self.ranks, tensors, view_dtype)
        encoding = self.ranks.together(lambda: _encoding_for(self.ranks, Encoding(config.encoding)))
        bucket = self.ranks.together(lambda: open_bucket(config.bucket, create=True, token=config.token, key=self._key))
        own, table = division[self.ranks.rank], table_of(tensors, view_dtype)
        snapshot = self.ranks.together(lambda: self._detector(tensors, table, own, optimizer))
        try:
            self._publisher = self._join(bucket, snapshot, encoding if snapshot.holds_old else Encoding.FAST, division)
        except BaseException:
            snapshot.close()
            raise
        self._hook = None if stepped is None else stepped.register_step_post_hook(self._count_step).remove

    # --- what users call ----------------------------------------------------------------------------

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
        """Find what has changed since the last durable version, and make it the next one in the background.

        Returns after detection: the model may be trained on at once. If nothing changed, no version is made. If the
        publish before is still under way, this one waits for it, and raises its error if nobody has seen it yet;
        the changes are not lost then, the next call publishes them.

        Args:
            step: the trainer's step, recorded with the version; default is the number of optimizer steps seen.
            name: free text recorded with the version; default is `config.name`.
            serve: whether replicas that follow the run are to serve the version; else it is only saved, for `serve`.
            ttl: seconds after which `hubsync gc` may delete the version, unless it is the newest, is served, or other
                versions rest on it; default is never, but for what the policy of `gc` says.
        """
        self._require_open()
        expires = _expiry(ttl)
        step = self.steps if step is None else int(operator.index(step))  # also numpy's and torch's integers
        info = VersionInfo(step, name or self.config.name, serve, expires)
        with self._publishing:
            self._publisher.begin()
            detected, changed, detect_s = self._detect()
            if self._is_elsewhere():
                manifest = self._anchor(info)
                if not changed:  # else the anchor of a publish before had failed, and these came after it
                    return self._publisher.anchored(manifest, info, detect_s)
            if changed:
                return self._publisher.submit(detected, info, detect_s)
            if serve and self._publisher.writer.serving != self.position.version:
                self._publisher.writer.serve(self.ranks, self.position.version)
            return self._publisher.unchanged(step, detect_s)

    def serve(self, version: int) -> Position:
        """Let replicas that follow the run serve a committed version: an older one, or one that was only saved.

        The training goes on where it is: the next version follows the newest one, not this. ChainError if the version
        does not exist.
        """
        self._require_open()
        with self._publishing:
            self._publisher.begin()
            return self._publisher.writer.serve(self.ranks, version)

    def _detect(self) -> tuple[Detected, bool, float]:
        """What has changed of this rank's part, whether anything has on any rank, and this rank's seconds."""
        found: list[tuple[Detected, float]] = []

        def detect() -> bool:
            started = time.perf_counter()
            snapshot = self._publisher.snapshot
            snapshot.follow(self._view.tensors())
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
        report = self._hotload(published.position)
        if report is None:
            return SyncReport(published, (), time.perf_counter() - started)
        self.ranks.together(report.raise_for_quorum)
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
            self._publisher.begin()
            self._publisher.snapshot.audit()
            return self._anchor(VersionInfo(self.steps, name or self.config.name))

    def close(self) -> None:
        """Wait for the publish under way and stop. Raises its error unless its ticket has; closing twice is fine."""
        self._close(anchor=self.config.anchor_at_close)

    def _close(self, *, anchor: bool) -> None:
        if self._closed:
            return
        try:
            self._publisher.wait()
            self._publisher.snapshot.audit()
            if anchor or self._is_elsewhere():
                self.anchor()
        finally:
            self._closed = True
            self._publisher.snapshot.close()
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
        # A rank that leaves with an error leaves alone: the others are elsewhere, and cannot join it in an anchor.
        alone = error is not None and self.ranks.size > 1
        try:
            self._close(anchor=self.config.anchor_at_close and not alone)
        except Exception:
            if error is None:
                raise
            logger.exception("while closing after another error")  # the first error is the one to see

    # --- joining the run ----------------------------------------------------------------------------

    def _detector(
        self, tensors: dict[str, torch.Tensor], table: TensorTable, own: list[Shard], optimizer: Any
    ) -> Detector:
        if self._adapter is not None and self.config.detector == "auto":
            return Snapshot(tensors, table, self.config.snapshot_device, own)  # small, and exact whatever writes
        held_whole = all(not hasattr(whole_of(tensor), "to_local") for tensor in tensors.values())
        if self.ranks.size == 1 and held_whole:
            return choose_detector(tensors, table, optimizer, self.config)
        if self.config.detector == "sliced":
            raise ConfigError(
                "detector='sliced' is for models that one process trains whole; here each rank compares what it owns: "
                "use detector='auto'"
            )
        return Snapshot(tensors, table, self.config.snapshot_device, own)

    def _join(self, bucket: Bucket, snapshot: Detector, encoding: Encoding, division: list[list[Shard]]) -> Publisher:
        digest = sum(self.ranks.gather(lambda: snapshot.digest), Digest())
        writer = JointWriter(bucket, self.ranks, lambda: self._open_writer(bucket, snapshot.table, digest))
        publisher = Publisher(
            writer,
            snapshot,
            self._write_side_files,
            encoding,
            anchor_every=self.config.anchor_every,
            anchor_fraction=self.config.anchor_fraction,
            catch_up=lambda position: _bytes_from(bucket, position),
            announce=self._announce,
            copy_base=lambda draft: copy_base(bucket, writer.run, draft, self._write_side_files),
            compactor=BackgroundCompactor(bucket) if self.config.compaction and self.ranks.rank == 0 else None,
            ranks=self.ranks,
            division=division,
        )
        if writer.position.digest == digest.hex:
            if writer.newest is None and writer.run.base.model is None:
                publisher.anchor()  # also if whoever created the run died before it could
            return publisher
        # Ranks that share a model would each need all of it to go back.
        patch = _way_back(bucket, writer.position, snapshot) if self.ranks.size == 1 else None
        if patch is not None:
            publisher.publish_patch(patch, digest.hex, VersionInfo(name=self.config.name))
            logger.info("the model is at an older version of the run: it is %s now, made by a delta", writer.position)
        else:
            logger.warning(
                "the model is not at the run's newest %s: uploading it whole, the run goes on from there",
                writer.position,
            )
            at = Position(writer.next_version(self.ranks), digest.hex)
            publisher.anchor(at, VersionInfo(name=self.config.name))
        return publisher

    def _open_writer(self, bucket: Bucket, table: TensorTable, digest: Digest) -> ChainWriter:
        if bucket.read([Layout.RUN]):
            if not self.config.resume:
                raise RunMismatch(
                    f"{bucket.address} already holds a run, and resume is False: choose another prefix for a new run"
                )
            writer = ChainWriter.resume(bucket, table, signs=self._key is not None)
            require_same_adapter(writer.run.adapter, self._adapter)
            return writer
        run = Run(
            run_id=secrets.token_hex(16),
            table=table,
            digest=digest.hex,
            base=Base() if self._adapter is not None else _base_of(self._model, self.config, table, digest),
            created=time.time(),
            public_key=None if self._key is None else self._key.public.hex,
            adapter=self._adapter,
        )
        return ChainWriter.create(bucket, run)

    def _is_elsewhere(self) -> bool:
        """Whether the detector counts changes from other weights than the run's newest: some were missed.

        Several ranks have detectors that miss none.
        """
        return self.ranks.size == 1 and self._publisher.snapshot.digest.hex != self.position.digest

    def _anchor(self, info: VersionInfo) -> Manifest:
        """An anchor of the current version, or of a new one if no delta can lead to the weights."""
        publisher = self._publisher
        if self._is_elsewhere():
            at = Position(publisher.writer.next_version(self.ranks), publisher.snapshot.digest.hex)
            return publisher.anchor(at, info)
        return publisher.anchor(info=replace(info, expires=None))

    def _write_side_files(self, directory: Path) -> None:
        if self._adapter is not None:
            write_adapter_config(directory, self._adapter)
            if hasattr(self._processing_class, "save_pretrained"):
                self._processing_class.save_pretrained(directory)
            return
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
        if self._deployment is not None:
            self._deployment.signal(position)

    def _hotload(self, position: Position) -> HotloadReport | None:
        """Rank 0 brings the servers to a version; the others learn what came of it. None if there are no servers."""
        deployment, timeout = self._deployment, self.config.stage_timeout
        if deployment is None:
            return None
        report = self.ranks.first(lambda: deployment.hotload(position, timeout=timeout))
        no_path = next((replica.error for replica in report.replicas if isinstance(replica.error, NoPath)), None)
        if no_path is None:
            return report
        logger.warning("uploading the whole model, because a server has no other way to it: %s", no_path)
        self.anchor()
        return self.ranks.first(lambda: deployment.hotload(position, timeout=timeout))


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


def _way_back(bucket: Bucket, newest: Position, snapshot: Detector) -> Patch | None:
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
            tensors = snapshot.tensors()
            patch = reader.merged(plan.steps, ViewBits(snapshot.table, tensors))
        except (BucketError, FormatError, NoPath) as error:
            logger.warning("the deltas from the model's version on cannot be read: %s", error)
            return None
    if digest_after(snapshot.table, tensors, snapshot.digest, patch).hex != newest.digest:
        logger.warning("the deltas from %s do not lead to %s", older, newest)
        return None
    return invert(patch)


def _bytes_from(bucket: Bucket, position: Position) -> int:
    """What a server at a position downloads to come to the newest version."""
    with tempfile.TemporaryDirectory(prefix="hubsync-") as cache:
        return ChainReader(bucket, cache).plan(position).nbytes


def _torch_optimizer(optimizer: Any) -> Any:
    if optimizer is None:
        return None
    optimizer = unwrapped(optimizer)  # accelerate's wrapper takes no hooks
    if not hasattr(optimizer, "register_step_post_hook"):
        raise ConfigError(f"{type(optimizer).__name__} is not a torch optimizer: pass that, or None")
    return optimizer


def _deployment(config: SyncConfig) -> Deployment | None:
    if not config.servers:
        return None
    from hubsync.replicas.deployment import Deployment

    return Deployment(
        config.servers, kv_cache=config.kv_cache, quorum=config.quorum, request_timeout=config.commit_timeout
    )


def _adapter_of(model: torch.nn.Module, config: SyncConfig, dtype: torch.dtype) -> Adapter | None:
    """What a PEFT model publishes; None of any other model, which publishes all of its weights."""
    if not is_adapted(model):
        return None
    return Adapter(adapter_config(model), _stated_base(model, config), base_digest(model, dtype))


def _base_of(model: torch.nn.Module, config: SyncConfig, table: TensorTable, digest: Digest) -> Base:
    """Where inference servers find version 0: what the user says, else what the model's config says.

    Nowhere, if that is not what the model holds now: it may have been trained since, or loaded from elsewhere.
    """
    base = _stated_base(model, config)
    directory = None if base.model is None else local_copy(base)
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


def _warn_of_lost_updates(tensors: dict[str, torch.Tensor], view_dtype: torch.dtype) -> None:
    narrow = {tensor.dtype for tensor in tensors.values() if tensor.requires_grad and tensor.element_size() < 4}
    if narrow:
        logger.warning(
            "the trained parameters are %s: updates smaller than half a unit in the last place are lost. Train with "
            "float32 parameters (and autocast); hubsync casts them to %s for inference",
            " and ".join(sorted(map(str, narrow))),
            view_dtype,
        )


def _warn_of_unpublished(model: torch.nn.Module, optimizer: Any) -> None:
    """What is trained without being of the model that was given: by intention, or because it is the wrong one."""
    if optimizer is None or steps_masters(optimizer):
        return
    given = {id(parameter) for parameter in model.parameters()}
    groups = unwrapped(optimizer).param_groups
    outside = [tensor for group in groups for tensor in group["params"] if id(tensor) not in given]
    if outside:
        logger.warning(
            "the optimizer trains %d tensors (%d elements) that are not in the model given to hubsync: servers never "
            "get them. Right for a value head, or for float32 masters that are copied into the model; else give "
            "hubsync the model that is trained",
            len(outside),
            sum(tensor.numel() for tensor in outside),
        )


def _without_wrapper(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DDP, DeepSpeed's engine and torch.compile: it has the config and the class that describe it."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return _without_wrapper(model.module)
    if is_deepspeeds(model):
        return _without_wrapper(model.get_submodule("module"))
    compiled = getattr(model, "_orig_mod", None)
    return model if compiled is None else _without_wrapper(compiled)


def _class_of(model: torch.nn.Module) -> type:
    """The class that loads it: `fully_shard` changes a model's class to one of its own."""
    from torch.distributed.fsdp import FSDPModule  # takes a second

    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def _encoding_for(ranks: Ranks, encoding: Encoding) -> Encoding:
    if ranks.size > 1 and encoding.needs_base:
        raise ConfigError(
            f"encoding='{encoding}' needs all old weights of a tensor in one process, and here several ranks share "
            "them: use encoding='fast'"
        )
    return encoding
