"""One worker's life with a run of LoRA adapters: materialise a version beside generation, then have vLLM load it.

The base model stays as it is; a version is a directory that PEFT and vLLM can read, verified by its digest before
anything loads it. What vLLM makes of it (stacked, scaled, padded) has no digest, so there is nothing to verify after.

vLLM knows the adapter by one name, for which its API server has one path: a link, `current`. A client registers both
once (`/v1/load_lora_adapter`). A commit moves the link and has the workers load it again in the place of what they
had, in the same turn of the engine in which caches are cut off and the label changes. Registering each version instead
would leave requests in between without a model, and with vLLM's `load_inplace` each forward pass would read the files.

Threads are divided as in `hubsync.apply.session`: requests on the main one, downloads on another.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader, Plan
from hubsync.chain.replay import View, replay
from hubsync.errors import HubsyncError, ReplicaPoisoned, ReplicaRefused, WrongParent
from hubsync.format.keys import PublicKey
from hubsync.format.manifest import Position, Run
from hubsync.format.parts import write_adapter

from .background import Background
from .protocol import WorkerState, error_to_json
from .session import CommitWindow
from .vote import SingleWorker, WorkerGroup

logger = logging.getLogger("vllm.hubsync")

_CACHE_BYTES = 4 << 30
_CURRENT = "current"


class Loader(Protocol):
    """vLLM's manager of adapters in this worker."""

    def check(self, run: Run) -> None:
        """ReplicaRefused if it could not serve adapters of the run."""
        ...

    def load(self, name: str, number: int, path: Path) -> None:
        """Load the directory at `path` in place of what is loaded as `number`. Raises whatever vLLM does."""
        ...


@dataclass(frozen=True)
class AdapterHost:
    """What a session needs of the process that serves adapters.

    Attributes:
        loader: vLLM's part of it.
        bucket: address of the run.
        cache: directory for downloads.
        directory: of this server's adapters; its workers share it, and no other server does.
        name: what requests call the adapter.
        public_key: documents of the run that it has not signed are refused; None takes all.
    """

    loader: Loader
    bucket: str
    cache: Path
    directory: Path
    name: str
    public_key: PublicKey | None = None

    @property
    def path(self) -> Path:
        """What vLLM is told to load: a link to the version that is served."""
        return self.directory / _CURRENT


class AdapterSession:
    """State of one worker that serves adapters. The interface is that of `Session`.

    Args:
        find_host: asked when attaching; raises a HubsyncError if this process cannot be served.
        ranks: the workers of this engine.
    """

    def __init__(self, find_host: Callable[[], AdapterHost], ranks: WorkerGroup | None = None):
        self._find_host = find_host
        self.ranks = ranks or SingleWorker()
        self._host: AdapterHost | None = None
        self._reader: ChainReader | None = None
        self._view: View | None = None  # the version materialised last
        self._ready: Position | None = None  # what the link was pointed at when attaching
        self._number: int | None = None  # vLLM's for the adapter, once it has loaded it
        self._position: Position | None = None
        self._before: Position | None = None  # for undo
        self._staged: Position | None = None
        self._wanted: Position | None = None
        self._window: CommitWindow | None = None
        self._broken: str | None = None  # why what is loaded is not known to be `_position`
        self._attaching = False
        self._error: HubsyncError | None = None
        self._metrics: dict[str, float] = {}
        self._background = Background()

    # --- what the requests do -----------------------------------------------------------------------

    @property
    def state(self) -> str:
        """detached, attaching, mapped (vLLM has not loaded the adapter yet), refused, ready, staging, staged or
        poisoned."""
        if self._attaching:
            return WorkerState.ATTACHING
        if self._position is None:
            if self._error is not None:
                return WorkerState.REFUSED
            return WorkerState.DETACHED if self._ready is None else WorkerState.MAPPED
        if self._broken is not None:
            return WorkerState.POISONED
        if self._wanted is not None:
            return WorkerState.STAGING
        return WorkerState.READY if self._staged is None else WorkerState.STAGED

    def status(self) -> dict[str, Any]:
        """What `hubsync_status` answers; `adapter` has its name, and the path to register it with."""
        window, error, host = self._window, self._error, self._known_host()
        return {
            "state": self.state,
            "run_id": None if self._reader is None else self._reader.run().run_id,
            **_json(self._position, {"version": None, "digest": None}),
            "staged": _json(self._staged, None),
            "window": window.to_json() if window else None,
            "error": error_to_json(error) if error else None,
            "metrics": dict(self._metrics),
            "adapter": None if host is None else {"name": host.name, "path": str(host.path)},
        }

    def start(self) -> None:
        if self.state == WorkerState.DETACHED:
            self._begin()

    def attach(self) -> None:
        """Start materialising the served version, for vLLM to load. A refusal is tried again."""
        if self.state in (WorkerState.DETACHED, WorkerState.REFUSED):
            self._begin()

    def join(self) -> None:
        if self._position is None:
            raise ReplicaRefused(
                "this server serves an adapter, which vLLM has not loaded yet: /v1/load_lora_adapter, with the name "
                "and path of hubsync_status"
            )

    def layout(self) -> dict[str, Any]:
        raise ReplicaRefused("this server serves an adapter, which vLLM stacks and scales: it has no layout to show")

    def registered(self, number: int, load: Callable[[], bool]) -> bool:
        """vLLM is about to load what the link points at. A collective of the engine's workers.

        Never raises, as vLLM's queues of answers would get out of step. If it failed on any of them, all return False,
        record an error, and can be attached again.
        """
        try:
            self._position = self._load_together(self._position or self._ready, load)
        except Exception as error:
            # vLLM has let go of what it had before it was asked to load this: nothing is left that could be broken.
            self._ready = self._position = self._before = self._broken = None
            self._fail("vLLM could not load the adapter", error)
            return False
        self._number, self._broken = number, None
        logger.info("hubsync: serving the adapter of %s", self._position)
        return True

    def stage(self, target: Position) -> None:
        """Start materialising `target`, which replaces any other target."""
        self._require()
        if self._wanted is None and target in (self._position, self._staged):
            return
        if self._wanted != target:
            self._error, self._wanted = None, target
            self._background.submit(self._stage)

    def open(self, position: Position, token: str) -> None:
        """A client begins a commit window. Refused while another one is open."""
        self._require()
        window = self._window
        if window is not None and (window.token, window.position) != (token, position):
            raise ReplicaRefused(f"a commit window to {window.position} is open; complete that one first")
        if window is None:
            self._window = CommitWindow(position, token, self._position == position, time.monotonic())

    def close(self, token: str) -> None:
        """The client has finished its window."""
        if self._window is not None and self._window.token != token:
            raise ReplicaRefused(f"the open commit window to {self._window.position} has another token")
        self._window = None

    def commit(self, target: Position) -> int:
        """Load what all ranks have staged, on all of them or on none. Returns elements of the adapter."""
        ready = self._position is not None and target in (self._position, self._staged)
        if not all(self.ranks.gather(ready)):
            raise ReplicaRefused(f"{target} is not staged on every worker: stage it, and commit again")
        started, before = time.perf_counter(), self._position
        if target == before and all(self.ranks.gather(self._broken is None)):
            return 0
        try:
            self._move(target)
        except ReplicaRefused:
            self._discard(target)
            raise
        self._before = before
        if self._staged == target:  # else a later target has been staged meanwhile
            self._staged = None
        self._metrics["commit_s"] = time.perf_counter() - started
        if self._window is not None:
            self._window.committed = self._window.position == target
        self._clean()
        assert self._reader is not None
        numel = self._reader.run().table.numel
        self._metrics["changed"] = numel
        return numel

    def undo(self) -> None:
        """Load the version before the last commit again."""
        before = self._before
        if not all(self.ranks.gather(before is not None)):
            raise ReplicaRefused("there is nothing to undo")
        assert before is not None
        self._move(before)
        self._before = None

    def heal(self) -> None:
        """Load the served version again."""
        if self._broken is None or self._position is None:
            raise ReplicaRefused("there is nothing to heal: the adapter is loaded")
        self._load(self._position)
        self._broken = self._error = None

    def weights_lost(self, reason: str) -> None:
        """vLLM has dropped what it had loaded; it is loaded again before the next forward pass."""
        if self._position is not None:
            self._broken = reason

    def before_forward(self) -> None:
        """Keep a model from running with an adapter that is not known to be right."""
        if self._broken is None:
            return
        reason = self._broken
        try:
            self.heal()
        except Exception as error:
            raise ReplicaPoisoned(
                f"refusing to run the model: {reason}; and the adapter could not be loaded again: {error}. Restart "
                "this server"
            ) from error

    # --- loading ------------------------------------------------------------------------------------

    def _load_together(self, own: Position | None, load: Callable[[], bool]) -> Position:
        """Have vLLM load what the link points at, for the first time. Returns what that is. A collective."""
        ready = self.ranks.gather(own)
        if ready[0] is None or any(position != ready[0] for position in ready):
            raise WrongParent("the workers have no version to load yet, or different ones: attach again")
        failure = None
        try:
            if not load():
                failure = "vLLM did not take it"
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        failures = [said for said in self.ranks.gather(failure) if said is not None]
        if failures:
            raise ReplicaRefused(failures[0])
        return ready[0]

    def _move(self, target: Position) -> None:
        """Load a materialised version on all ranks; where one cannot, all go back. A collective."""
        before, failure = self._position, None
        try:
            self._load(target)
        except Exception as error:
            failure = f"vLLM could not load the adapter of {target}: {type(error).__name__}: {error}"
        failures = [said for said in self.ranks.gather(failure) if said is not None]
        if not failures:
            self._position, self._broken = target, None
            return
        assert before is not None
        try:
            self._load(before)
        except Exception as error:
            self._broken = f"{failures[0]}; nor that of {before} again: {error}"
        raise ReplicaRefused(failures[0])

    def _load(self, position: Position) -> None:
        host, number = self._host, self._number
        assert host is not None
        assert number is not None
        directory = _place(host, position)
        _point(host.path, directory)
        host.loader.load(host.name, number, directory)  # not the link: another engine of this server may move it

    def _discard(self, target: Position) -> None:
        """Delete what was staged and could not be loaded: staging it again writes it again."""
        host = self._host
        assert host is not None
        if target != self._position:
            self._staged = None
            shutil.rmtree(_place(host, target), ignore_errors=True)

    def _clean(self) -> None:
        """Delete directories of versions that nobody can ask for without staging them again."""
        host = self._host
        assert host is not None
        # What is being staged here may have been written by another worker already. Asked for in this order, as the
        # other thread makes what is wanted staged.
        positions = self._position, self._before, self._wanted, self._staged
        kept = {_place(host, position) for position in positions if position}
        for directory in host.directory.iterdir():
            if directory.name != _CURRENT and not directory.name.startswith(".") and directory not in kept:
                shutil.rmtree(directory, ignore_errors=True)

    # --- what the background thread does ------------------------------------------------------------

    def _begin(self) -> None:
        self._attaching, self._error = True, None
        self._background.submit(self._attach)

    def _attach(self) -> None:
        started = time.perf_counter()
        try:
            host = self._host = self._find_host()
            reader = ChainReader(open_bucket(host.bucket, key=host.public_key), host.cache)
            run = reader.run()
            if run.adapter is None:
                raise ReplicaRefused(
                    "this server runs with LoRA, which wraps the layers, and the run publishes a whole model; start it "
                    "without --enable-lora"
                )
            host.loader.check(run)
            self._reader = reader
            served = reader.served()
            self._materialise(served)
            _point(host.path, _place(host, served))
            self._ready = served
            self._metrics["attach_s"] = time.perf_counter() - started
        except Exception as error:
            self._fail("could not attach", error)
        finally:
            self._attaching = False

    def _stage(self) -> None:
        target = self._wanted
        if target is None:
            return
        started = time.perf_counter()
        try:
            plan = self._materialise(target)
            self._staged = target
            self._metrics["stage_s"] = time.perf_counter() - started
            self._metrics["stage_bytes"] = plan.nbytes
        except Exception as error:
            self._staged = None
            self._fail(f"could not stage {target}", error)
        finally:
            if self._wanted == target:  # else a newer target is queued behind
                self._wanted = None

    def _materialise(self, target: Position) -> Plan:
        """Write the directory of a version. Its digest is recomputed from what is written."""
        host, reader = self._host, self._reader
        assert host is not None
        assert reader is not None
        plan, view = reader.carry_out(
            lambda: _plan(reader, None if self._view is None else self._view.position, target),
            lambda plan: (plan, self._walk(reader, plan)),
        )
        _write(_place(host, target), reader.run(), view)
        reader.trim(_CACHE_BYTES)
        return plan

    def _walk(self, reader: ChainReader, plan: Plan) -> View:
        view, self._view = self._view, None  # what fails on the way leaves it nowhere
        if plan.start is None or view is None:
            view = replay(reader, plan)
        else:
            for step in plan.steps:
                view.apply(reader.patch(step.manifest, view.bits), step)
            view.verify()
        self._view = view
        return view

    # --- details ------------------------------------------------------------------------------------

    def _known_host(self) -> AdapterHost | None:
        """Also before there is a run: clients ask for the adapter's name first."""
        if self._host is None:
            try:
                self._host = self._find_host()
            except HubsyncError:
                return None  # attaching says why
        return self._host

    def _require(self) -> None:
        if self._position is None:
            if self._error is not None:
                raise self._error
            raise ReplicaRefused(f"this worker is {self.state}; call hubsync_attach and wait until it is ready")

    def _fail(self, what: str, error: Exception) -> None:
        expected = isinstance(error, HubsyncError)
        self._error = error if isinstance(error, HubsyncError) else ReplicaRefused(f"{type(error).__name__}: {error}")
        logger.log(
            logging.WARNING if expected else logging.ERROR, "hubsync: %s: %s", what, error, exc_info=not expected
        )


def _plan(reader: ChainReader, have: Position | None, target: Position) -> Plan:
    plan = reader.plan(have, to=target.version)
    if plan.target != target:
        raise WrongParent(f"version {target.version} of the run has digest {plan.target.digest}, not {target.digest}")
    return plan


def _place(host: AdapterHost, position: Position) -> Path:
    return host.directory / f"{position.version:08d}-{position.digest}"


def _write(directory: Path, run: Run, view: View) -> None:
    """Beside it first: another worker of this server may be writing the same, or loading it."""
    if directory.exists():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix="."))
    try:
        write_adapter(staging, run, view.tensors)
        staging.rename(directory)
    except OSError:
        if not directory.exists():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _point(link: Path, directory: Path) -> None:
    """Let the link lead to a directory beside it, at once. Other workers may do the same."""
    temporary = link.with_name(f".{link.name}-{secrets.token_hex(8)}")
    temporary.symlink_to(directory.name)
    temporary.replace(link)


def _json(position: Position | None, otherwise: Mapping[str, Any] | None) -> Any:
    return otherwise if position is None else {"version": position.version, "digest": position.digest}
