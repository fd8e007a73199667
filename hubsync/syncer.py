"""`WeightSyncer`: the life of named snapshots of a policy, as users of hosted RL services know it.

Saving makes a version of the run, under a name. Hot-loading brings the deployment to one. Both are also to be had by
themselves. This adds names, the choice between whole models and deltas, checks and retries to what the engine and the
deployment do.
"""

from __future__ import annotations

import logging
import re
import secrets
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader
from hubsync.errors import ConfigError, HubsyncError, NoPath, ReplicaError, RunMismatch
from hubsync.manifest import Position
from hubsync.replica.deployment import Deployment, ReplicaReport
from hubsync.trainer.config import SyncConfig
from hubsync.trainer.engine import DeltaWeightTransferEngine

logger = logging.getLogger(__name__)

CHECKPOINT_TYPES = ("base", "delta")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class _Snapshot:
    """A named position; `expires` is of `time.monotonic()`, None for never."""

    position: Position
    expires: float | None = None


class WeightSyncer:
    """Saves snapshots of a model to a bucket, and hot-loads them on a deployment.

    A name given by the user is made unique with the session, which is this object: `step-5` becomes `step-5-1a2b3c4d`.
    The full name stands in the version's manifest, so other sessions can hot-load it too.

    Args:
        model: the model being trained; see [`DeltaWeightTransferEngine`].
        optimizer: its optimizer, or None.
        config: settings of the engine. Its `servers` must be empty: the deployment is what is pushed to.
        deployment: the servers; None if all of them follow the bucket by themselves (`hubsync follow`).
        first_checkpoint_type: what the first snapshot of the session is: `"base"`, uploaded whole, or `"delta"`.
        compression_format: level of the codec, see `SyncConfig.encoding`; default is the config's.
        hotload_timeout: seconds that servers have for a hot-load.
        dcp_directory: where `save_dcp` writes.
        dcp_timeout: seconds that `save_dcp` may take.
        warmup_after_hotload: whether to have every server generate a token after a hot-load.
        warmup_max_retries: how often that is tried again.

    Usage:

    ```python
    >>> from hubsync import SyncConfig, WeightSyncer
    >>> from hubsync.replica.deployment import Deployment

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
        compression_format: str | None = None,
        hotload_timeout: float = 600.0,
        dcp_directory: str | Path = "checkpoints",
        dcp_timeout: float = 2700.0,
        warmup_after_hotload: bool = True,
        warmup_max_retries: int = 10,
    ):
        _require_type(first_checkpoint_type)
        if config.servers:
            raise ConfigError("a WeightSyncer pushes to its deployment: leave SyncConfig.servers empty")
        self.session = secrets.token_hex(4)
        self.deployment = deployment
        self._model = model
        self._optimizer = optimizer
        self._next_type = first_checkpoint_type
        self._hotload_timeout = hotload_timeout
        self._dcp_directory = Path(dcp_directory)
        self._dcp_timeout = dcp_timeout
        self._warmup = warmup_after_hotload
        self._warmup_max_retries = warmup_max_retries
        self._snapshots: dict[str, _Snapshot] = {}
        self._loaded: Position | None = None  # where all servers are known to be
        self.engine = DeltaWeightTransferEngine(
            model, optimizer, replace(config, encoding=compression_format or config.encoding)
        )
        self._cache = tempfile.TemporaryDirectory(prefix="hubsync-syncer-")
        self._reader = ChainReader(open_bucket(config.bucket, token=config.token), self._cache.name)

    # --- saving and hot-loading ---------------------------------------------------------------------

    def save_and_hotload(self, name: str, checkpoint_type: str | None = None) -> str:
        """Save a snapshot, bring the deployment to it, and let followers have it.

        Args:
            checkpoint_type: `"base"` or `"delta"`; default is the session's first type, and deltas from then on.

        Returns:
            the snapshot's full name.

        Raises:
            HubsyncError: it could not be saved (the next one will hold its changes), or not hot-loaded (it is saved,
                and `hotload` can be tried again).
        """
        snapshot = self._save(name, checkpoint_type, ttl=None, serve=True)
        self._hotload(snapshot)
        return snapshot

    def save_only(self, name: str, checkpoint_type: str | None = None, ttl: float | None = None) -> str | None:
        """Save a snapshot that nobody moves to before it is hot-loaded.

        Args:
            ttl: seconds for which the name can be hot-loaded. The version itself stays, as a link of the chain.

        Returns:
            the snapshot's full name; None if it could not be saved: the next one will hold its changes.
        """
        try:
            return self._save(name, checkpoint_type, ttl, serve=False)
        except ConfigError:
            raise
        except HubsyncError as error:
            logger.warning("%s was not saved: %s", name, error)
            return None

    def hotload(self, snapshot_name: str) -> bool:
        """Bring the deployment to a snapshot, of this session or another one, newer or older; let followers have it.

        False if it failed: the log says why, and servers that have not got there serve what they did.
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

        The directory `dcp_directory/name` holds the keys `model` and `optimizer`, as `get_state_dict` makes them; it
        appears once it is complete. False if it failed or took longer than `dcp_timeout`.
        """
        _require_name(name)
        done: list[bool] = []
        deadline = time.monotonic() + self._dcp_timeout
        thread = threading.Thread(
            target=lambda: done.append(self._write_dcp(name, deadline)), name="hubsync-dcp", daemon=True
        )
        thread.start()
        thread.join(self._dcp_timeout)
        if thread.is_alive():
            logger.warning("%s was not saved in %g s", name, self._dcp_timeout)
        return done == [True]

    # --- the deployment -----------------------------------------------------------------------------

    def check_deployment_state(self) -> str | None:
        """The full name of the snapshot that all servers serve; None if they differ, or it has no name.

        What they serve is taken as what the next delta has to lead on from.
        """
        reports = self._replicas()
        positions = {report.position for report in reports}
        self._loaded = positions.pop() if len(positions) == 1 else None
        for report in reports:
            logger.info("%s: %s, version %s, %s", report.url, report.state, report.version, report.error or "no error")
        return None if self._loaded is None else self._name_of(self._loaded)

    def wait_for_hotload_ready(self, timeout_s: float = 600.0, poll_interval_s: float = 5.0) -> bool:
        """Return True once the servers can take a hot-load; False if too few could after `timeout_s`."""
        if self.deployment is None:
            return True
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.deployment.wait_ready(min(poll_interval_s, timeout_s))
                return True
            except ReplicaError as error:
                remaining = deadline - time.monotonic()
                logger.info("not ready, %.0f s left: %s", max(0.0, remaining), error)
                if remaining <= 0:
                    return False
                time.sleep(min(poll_interval_s, remaining))

    def close(self) -> None:
        """End the session. The servers serve on."""
        try:
            self.engine.close()
        finally:
            if self.deployment is not None:
                self.deployment.close()
            self._cache.cleanup()

    def __enter__(self) -> WeightSyncer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- saving -------------------------------------------------------------------------------------

    def _save(self, name: str, checkpoint_type: str | None, ttl: float | None, serve: bool) -> str:
        _require_name(name)
        kind = _require_type(checkpoint_type or self._next_type)
        full = f"{name}-{self.session}"
        if full in self._snapshots:
            raise ConfigError(f"this session has saved {name} already: choose another name")
        position = self._publish(full, serve)
        if kind == "base":
            self.engine.anchor(name=full)
        self._next_type = "delta"
        self._snapshots[full] = _Snapshot(position, None if ttl is None else time.monotonic() + ttl)
        return full

    def _publish(self, name: str, serve: bool) -> Position:
        """Make what has changed a version. Followers stay where they are unless `serve`."""
        return self.engine.publish(name=name, serve=serve).result().position

    def _serve(self, position: Position) -> None:
        """Let followers have this position."""
        self.engine.serve(position.version)

    # --- hot-loading --------------------------------------------------------------------------------

    def _hotload(self, name: str) -> None:
        position = self._find(name)
        self._require_lineage(position)
        if self.deployment is not None:
            self._push(self.deployment, position, name)
        self._serve(position)
        self._loaded = position
        if self.deployment is not None and self._warmup:
            self.deployment.warm_up(self._warmup_max_retries)

    def _push(self, deployment: Deployment, position: Position, name: str) -> None:
        report = deployment.hotload(position, timeout=self._hotload_timeout)
        lost = next((replica.error for replica in report.replicas if isinstance(replica.error, NoPath)), None)
        if lost is not None and position == self.engine.position:
            logger.warning("saving %s whole, because a server has no other way to it: %s", name, lost)
            self.engine.anchor(name=name)
            report = deployment.hotload(position, timeout=self._hotload_timeout)
        report.raise_for_quorum()

    def _find(self, name: str) -> Position:
        snapshot = self._snapshots.get(name)
        if snapshot is None:
            named = (manifest.position for manifest in reversed(self._reader.manifests()) if manifest.name == name)
            snapshot = next((_Snapshot(position) for position in named), None)
        if snapshot is None:
            raise NoPath(f"the run has no snapshot {name}: a full name ends with its session, as `hubsync ls` shows it")
        if snapshot.expires is not None and time.monotonic() > snapshot.expires:
            raise NoPath(f"{name} was saved to be hot-loaded for a time that is over")
        return snapshot.position

    def _require_lineage(self, position: Position) -> None:
        """The run must hold this very position, and a way to it from the snapshot that was loaded before."""
        self._reader.newest()
        known = self._reader.run().origin if position.version == 0 else self._reader.manifest(position.version).position
        if known != position:
            raise RunMismatch(f"the run has {known} where this session saved {position}: another trainer works on it")
        self._reader.plan(self._loaded, position.version, base_available=True)

    def _replicas(self) -> tuple[ReplicaReport, ...]:
        return () if self.deployment is None else self.deployment.status()

    def _name_of(self, position: Position) -> str | None:
        mine = (name for name, snapshot in self._snapshots.items() if snapshot.position == position)
        others = (manifest.name for manifest in self._reader.manifests() if manifest.position == position)
        return next(mine, None) or next(others, None)

    # --- training state -----------------------------------------------------------------------------

    def _write_dcp(self, name: str, deadline: float) -> bool:
        import torch.distributed.checkpoint as dcp

        self._dcp_directory.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=self._dcp_directory, prefix=f".{name}-"))
        try:
            dcp.save(self._training_state(), checkpoint_id=staging, no_dist=True)
            if time.monotonic() > deadline:  # training goes on: what is written late may be torn
                return False
            shutil.rmtree(self._dcp_directory / name, ignore_errors=True)
            staging.rename(self._dcp_directory / name)
        except Exception as error:
            logger.warning("%s was not saved: %s: %s", name, type(error).__name__, error)
            return False
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return True

    def _training_state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict

        if self._optimizer is None:
            return {"model": get_model_state_dict(self._model)}
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer}


def _require_type(checkpoint_type: str) -> str:
    if checkpoint_type not in CHECKPOINT_TYPES:
        raise ConfigError(f"checkpoint_type must be one of {', '.join(CHECKPOINT_TYPES)}, not {checkpoint_type!r}")
    return checkpoint_type


def _require_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is not a name: letters, digits, and . _ - after the first of them, at most 200")
