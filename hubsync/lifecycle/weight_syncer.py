"""`WeightSyncer`: named snapshots of a policy, with the interface of hosted RL services.

Saving publishes a version of the run under a name. Hot-loading brings the deployment to a saved version. A session can
do both at once, or each alone. `WeightSyncer` adds names, the choice between whole models and deltas, checks and
retries to the engine and the deployment.
"""

from __future__ import annotations

import logging
import re
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType

import torch

from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader
from hubsync.errors import CheckpointFailed, ConfigError, HubsyncError, NoPath, RunMismatch
from hubsync.format.manifest import Position
from hubsync.publish.config import DeltaEncoding, SyncConfig
from hubsync.publish.engine import DeltaWeightTransferEngine
from hubsync.publish.results import Ticket
from hubsync.replicas.deployment import Deployment, HotloadReport, ReplicaReport
from hubsync.replicas.server import checked_seconds
from hubsync.retry import attempts

from .checkpoint_coordinator import CheckpointCoordinator
from .training_states import StateWriting, TrainingStates

logger = logging.getLogger(__name__)

CHECKPOINT_TYPES = ("base", "delta")
_GRACE_S = 60.0  # the parts of `save_dcp` end by themselves after `dcp_timeout`

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class _NamedVersion:
    """A version saved under a name. `expires` is in seconds since 1970, None for never."""

    position: Position
    expires: float | None = None


class WeightSyncer:
    """Saves snapshots of a model to a bucket, and hot-loads them on a deployment.

    The session makes a user's name unique: `step-5` becomes `step-5-1a2b3c4d`. The full name is recorded in the
    version's manifest, so other sessions can hot-load it too. A second name for a version, given when nothing has
    changed since, is known to this session alone.

    Under torch.distributed every rank makes a `WeightSyncer` and calls the same methods in the same order. All ranks
    return or raise the same. Rank 0 calls the servers.

    Args:
        model: the model being trained; see [`DeltaWeightTransferEngine`].
        optimizer: its optimizer, or None.
        config: settings of the engine. Its `servers` must be empty: the deployment holds the servers.
        deployment: the servers to push to; None if all servers follow the bucket (`hubsync follow`). Only rank 0's
            deployment is used.
        first_checkpoint_type: type of the session's first snapshot: `"base"`, uploaded whole, or `"delta"`.
        compression_format: encoding of the deltas, see `SyncConfig.encoding`; default is the config's.
        hotload_timeout: seconds that servers have for a hot-load.
        dcp_directory: directory of `save_dcp`, on a disk that all ranks reach.
        dcp_timeout: seconds that a rank may take to write there, and to make the version durable.
        warmup_after_hotload: whether every server generates a token after a hot-load.
        warmup_max_retries: number of repeated attempts at that.

    Raises:
        ConfigError: an argument is invalid; the message names it.

    Usage:

    ```python
    >>> from hubsync import SyncConfig, WeightSyncer
    >>> from hubsync.replicas.deployment import Deployment

    >>> deployment = Deployment(["http://localhost:8000"])
    >>> with WeightSyncer(model, optimizer, SyncConfig(bucket="hf://buckets/me/rl/run1"), deployment) as syncer:
    ...     syncer.wait_for_hotload_ready()
    ...     for step, batch in enumerate(batches):
    ...         train(batch)
    ...         syncer.save_and_hotload(f"step-{step}")
    ```
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        config: SyncConfig,
        deployment: Deployment | None = None,
        *,
        first_checkpoint_type: str = "base",
        compression_format: DeltaEncoding | None = None,
        hotload_timeout: float = 600.0,
        dcp_directory: str | Path = "checkpoints",
        dcp_timeout: float = 2700.0,
        warmup_after_hotload: bool = True,
        warmup_max_retries: int = 10,
    ):
        _require_type(first_checkpoint_type)
        if config.servers:
            raise ConfigError("a WeightSyncer pushes to its deployment: leave SyncConfig.servers empty")
        if not isinstance(deployment, Deployment | None):
            raise ConfigError(f"deployment must be a Deployment([url, ...]) or None, not a {type(deployment).__name__}")
        checked_seconds("hotload_timeout", hotload_timeout)
        checked_seconds("dcp_timeout", dcp_timeout)
        if not isinstance(warmup_max_retries, int) or warmup_max_retries < 0:
            raise ConfigError(f"warmup_max_retries must be 0 or a number of tries, not {warmup_max_retries!r}")
        states = Path(dcp_directory)
        self.deployment = deployment
        self._model = model
        self._optimizer = optimizer
        self._next_type = first_checkpoint_type
        self._hotload_timeout = hotload_timeout
        self._warmup = warmup_after_hotload
        self._warmup_max_retries = warmup_max_retries
        self._snapshots: dict[str, _NamedVersion] = {}
        self._loaded: Position | None = None  # what all servers are known to serve
        self._dcp_timeout = dcp_timeout
        self._saves = 0  # calls of `save_dcp`: the coordinator's steps
        self._writing: StateWriting | None = None  # of the last of them
        self.engine = DeltaWeightTransferEngine(
            model, optimizer, replace(config, encoding=compression_format or config.encoding)
        )
        self._ranks = self.engine.ranks
        try:
            self.session = self._ranks.first(lambda: secrets.token_hex(4))
            self._is_pushing = self._ranks.first(lambda: deployment is not None)
            self._states = TrainingStates(states, self._ranks)
            self._coordinator = CheckpointCoordinator(
                self._show_state, alone=self._ranks.size == 1, save_timeout=dcp_timeout + _GRACE_S
            )
            self._cache = tempfile.TemporaryDirectory(prefix="hubsync-syncer-")
            self._reader = ChainReader(open_bucket(config.bucket, token=config.token), self._cache.name)
        except BaseException as error:
            self.engine.__exit__(type(error), error, error.__traceback__)
            raise
        self._is_closed = False

    # --- saving and hot-loading ---------------------------------------------------------------------

    def save_and_hotload(self, name: str, checkpoint_type: str | None = None) -> str:
        """Save a snapshot, and serve it on the deployment and on all followers.

        Args:
            checkpoint_type: `"base"` or `"delta"`; default is the session's first type for the first snapshot, and
                `"delta"` for later ones.

        Returns:
            the snapshot's full name.

        Raises:
            HubsyncError: it could not be saved (the next snapshot holds its changes), or not hot-loaded (it is saved:
                call `hotload` again).
        """
        snapshot = self._save(name, checkpoint_type, ttl=None, serve=True)
        self._hotload(snapshot)
        return snapshot

    def save_only(self, name: str, checkpoint_type: str | None = None, ttl: float | None = None) -> str | None:
        """Save a snapshot that no server serves before it is hot-loaded.

        Args:
            ttl: seconds for which the name can be hot-loaded. Then `hubsync gc` may delete the version, unless it is
                the newest, is served, or later versions depend on it.

        Returns:
            the snapshot's full name; None if it could not be saved: the next snapshot holds its changes.
        """
        try:
            return self._save(name, checkpoint_type, ttl, serve=False)
        except ConfigError:
            raise
        except HubsyncError as error:
            logger.warning("%s was not saved: %s", name, error)
            return None

    def hotload(self, snapshot_name: str) -> bool:
        """Serve a snapshot on the deployment and on all followers. It may be older, or of another session.

        Returns:
            False if it failed: the log says why. Servers that did not commit serve what they served before.
        """
        try:
            self._hotload(snapshot_name)
        except ConfigError:
            raise
        except HubsyncError as error:
            logger.warning("%s was not hot-loaded: %s", snapshot_name, error)
            return False
        return True

    def save_dcp(self, name: str) -> bool:
        """Save model and optimizer with `torch.distributed.checkpoint`, so that training can go on from there.

        What has changed since the newest version is published first, as a version that nothing serves yet. The
        directory `dcp_directory/name` holds the keys `model` and `optimizer` of all ranks, as `get_state_dict` makes
        them. It appears once the version and the state are durable on all ranks, and replaces an older one of this
        name.

        Returns:
            False if a part of it failed on any rank, or took longer than `dcp_timeout`: the log says why, and no
            directory appears.
        """
        self._ranks.together(lambda: self._require_usable(name))
        steps = self.engine.steps
        try:
            ticket = self.engine.publish(name=f"{name}-{self.session}", serve=False)
            writing = self._states.begin(name, self._model, self._optimizer)
            self._save_together(ticket, writing)
        except HubsyncError as error:
            logger.warning("%s was not saved: %s", name, error)
            return False
        finally:
            self.engine.steps = steps  # torch may have stepped an optimizer that was new
        return True

    def _save_together(self, ticket: Ticket, writing: StateWriting) -> None:
        """Wait until version and state are durable on all ranks, and show the state. CheckpointFailed if one is not."""
        coordinator, timeout = self._coordinator, self._dcp_timeout
        self._writing, self._saves = writing, self._saves + 1
        step, failures = self._saves, []
        for call in (
            partial(coordinator.register_and_monitor, step, state_dict_thread_count=1, checkpoint_thread_count=1),
            partial(coordinator.save_async, "version", lambda: ticket.result(timeout), step, is_state_dict=True),
            partial(coordinator.save_async, "state", lambda: writing.wait(timeout), step),
            coordinator.wait_all,
        ):
            try:
                call()
            except CheckpointFailed as failure:  # of an earlier call, which every rank makes in any case
                failures.append(failure)
        writing.discard()
        if failures:
            raise failures[0]

    def _show_state(self, save: int, is_state_dict: bool) -> None:
        """Make the state of the last `save_dcp` visible. The coordinator calls this on rank 0."""
        assert self._writing is not None
        self._writing.show()

    # --- the deployment -----------------------------------------------------------------------------

    def check_deployment_state(self) -> str | None:
        """The full name of the snapshot that all servers serve; None if they differ, or it has no name.

        The next hot-load must find a path from there.
        """
        return self._ranks.first(self._check_deployment_state)

    def _check_deployment_state(self) -> str | None:
        self._require_open()
        reports = self._replicas()
        positions = {report.position for report in reports}
        self._loaded = positions.pop() if len(positions) == 1 else None
        for report in reports:
            logger.info("%s: %s, version %s, %s", report.url, report.state, report.version, report.error or "no error")
        return None if self._loaded is None else self._name_of(self._loaded)

    def wait_for_hotload_ready(self, timeout_s: float = 600.0, poll_interval_s: float = 5.0) -> bool:
        """Return True once the servers can take a hot-load; False if too few could after `timeout_s`."""
        checked_seconds("timeout_s", timeout_s, zero=True)
        checked_seconds("poll_interval_s", poll_interval_s)
        return self._ranks.first(lambda: self._wait_for_hotload_ready(timeout_s, poll_interval_s))

    def _wait_for_hotload_ready(self, timeout_s: float, poll_interval_s: float) -> bool:
        self._require_open()
        if self.deployment is None:
            return True
        what = "the servers to be ready for a hot-load"
        for left in attempts(timeout_s, waiting_for=what, first=poll_interval_s, longest=poll_interval_s):
            try:
                self.deployment.wait_ready(min(poll_interval_s, left))
                return True
            except ConfigError:
                raise
            except HubsyncError as error:  # also errors of workers about the run and the bucket
                logger.log(logging.WARNING if left == 0.0 else logging.INFO, "not ready, %.0f s left: %s", left, error)
        return False

    def close(self, leave_serving: bool = True) -> None:
        """End the session. Servers go on serving, unless `leave_serving` is False: see `Deployment.close`."""
        self._end(self.engine.close, leave_serving)

    def _end(self, close_engine: Callable[[], None], leave_serving: bool) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        try:
            close_engine()
        finally:
            self._coordinator.close()
            if self.deployment is not None:
                self.deployment.close(leave_serving=leave_serving)
            self._cache.cleanup()

    def __enter__(self) -> WeightSyncer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the engine skips what makes no sense any more, and the error stays the one that is raised.
        self._end(lambda: self.engine.__exit__(kind, error, trace), leave_serving=True)

    # --- saving -------------------------------------------------------------------------------------

    def _save(self, name: str, checkpoint_type: str | None, ttl: float | None, serve: bool) -> str:
        full, kind = self._ranks.together(lambda: self._full_name(name, checkpoint_type))
        position, expires = self._publish(full, serve, ttl), None if ttl is None else time.time() + ttl
        if kind == "base":
            self.engine.anchor(name=full)
        self._next_type = "delta"
        self._warn_of_earlier_end(full, position, expires)
        self._snapshots[full] = _NamedVersion(position, expires)
        return full

    def _full_name(self, name: str, checkpoint_type: str | None) -> tuple[str, str]:
        self._require_usable(name)
        kind = _require_type(self._next_type if checkpoint_type is None else checkpoint_type)
        full = f"{name}-{self.session}"
        if full in self._snapshots:
            raise ConfigError(f"this session has saved {name} already: choose another name")
        return full, kind

    def _publish(self, name: str, serve: bool, ttl: float | None) -> Position:
        """Publish what has changed. Followers stay where they are unless `serve`."""
        return self.engine.publish(name=name, serve=serve, ttl=ttl).result().position

    def _warn_of_earlier_end(self, name: str, position: Position, expires: float | None) -> None:
        """Warn if this is a second name of a version that expires: the expiry is recorded with the version."""
        for other, snapshot in self._snapshots.items():
            end = snapshot.expires
            if snapshot.position == position and end is not None and (expires is None or expires > end):
                logger.warning("%s is the same version as %s, and expires with it", name, other)

    def _serve(self, position: Position) -> None:
        """Have followers serve this position."""
        self.engine.serve(position.version)

    # --- hot-loading --------------------------------------------------------------------------------

    def _hotload(self, name: str) -> None:
        position = self._ranks.first(lambda: self._checked(name))
        if self._is_pushing:
            self._push(position, name)
        self._serve(position)
        self._loaded = position
        if self._is_pushing and self._warmup:
            self._ranks.first(lambda: self._servers.warm_up(self._warmup_max_retries))

    def _checked(self, name: str) -> Position:
        """The position of a snapshot that can be hot-loaded."""
        self._require_open()
        position = self._find(name)
        self._require_lineage(position)
        return position

    def _push(self, position: Position, name: str) -> None:
        report = self._bring(position)
        lost = next((replica.error for replica in report.replicas if isinstance(replica.error, NoPath)), None)
        if lost is not None and position == self.engine.position:
            logger.warning("uploading %s whole, because a server has no path to it: %s", name, lost)
            self.engine.anchor(name=name)
            report = self._bring(position)
        report.raise_for_quorum()

    def _bring(self, position: Position) -> HotloadReport:
        return self._ranks.first(lambda: self._servers.hotload(position, timeout=self._hotload_timeout))

    @property
    def _servers(self) -> Deployment:
        assert self.deployment is not None, "rank 0 has one"
        return self.deployment

    def _find(self, name: str) -> Position:
        if not isinstance(name, str):  # None would match any version without a name
            raise NoPath(f"{name!r:.80} is not the name of a snapshot: save_only returns None if it could not save")
        snapshot = self._snapshots.get(name) or self._find_in_run(name)
        if snapshot is None:
            raise NoPath(
                f"the run has no snapshot {name!s:.300}: give the full name, with its session, as `hubsync ls` shows it"
            )
        if snapshot.expires is not None and time.time() > snapshot.expires:
            raise NoPath(f"{name} has expired (ttl): hot-load another snapshot, or save it again")
        return snapshot.position

    def _find_in_run(self, name: str) -> _NamedVersion | None:
        """The newest version of this name. Its delta records when it expires, its anchor does not."""
        named = [manifest for manifest in self._reader.manifests() if manifest.name == name]
        if not named:
            return None
        position = named[-1].position
        expires = (manifest.expires for manifest in named if manifest.position == position)
        return _NamedVersion(position, next((end for end in expires if end is not None), None))

    def _require_lineage(self, position: Position) -> None:
        """Require that the run holds exactly this position, and a path to it from the one that was loaded before.

        Raises:
            RunMismatch: the run has another digest for the version.
            NoPath: no deltas or anchor lead there.
        """
        self._reader.newest()
        known = self._reader.run().origin if position.version == 0 else self._reader.manifest(position.version).position
        if known != position:
            raise RunMismatch(
                f"the run has {known}, this session saved {position}: another trainer publishes to it. Stop one of "
                "them, and start a new session"
            )
        self._reader.plan(self._loaded, position.version, base_available=True)

    def _replicas(self) -> tuple[ReplicaReport, ...]:
        return () if self.deployment is None else self.deployment.status()

    def _name_of(self, position: Position) -> str | None:
        mine = (name for name, snapshot in self._snapshots.items() if snapshot.position == position)
        others = (manifest.name for manifest in self._reader.manifests() if manifest.position == position)
        return next(mine, None) or next(others, None)

    def _require_usable(self, name: str) -> None:
        self._require_open()
        _require_name(name)

    def _require_open(self) -> None:
        if self._is_closed:
            raise ConfigError("this session is closed: make a new WeightSyncer, it continues the run")


def _require_type(checkpoint_type: str) -> str:
    if checkpoint_type not in CHECKPOINT_TYPES:
        raise ConfigError(f"checkpoint_type must be one of {', '.join(CHECKPOINT_TYPES)}, not {checkpoint_type!r}")
    return checkpoint_type


def _require_name(name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r:.300} is not a name: use letters, digits and . _ - (the first a letter or digit), at most 200"
        )
