"""A served LoRA adapter: versions are materialised as directories, and the engine loads them.

The base model stays as it is. A version is a directory that PEFT and the engine can read, verified by its digest before
anything loads it. The engine's copies of it (stacked, scaled, padded) are no part of the run's digest. What is verified
later is that they, and the base model, are what they were when they were loaded.

The engine knows the adapter by one name, for which its API server has one path: a link, `current`. A client registers
both once (for vLLM with `/v1/load_lora_adapter`). A commit moves the link and has the workers load the new directory in
place of the old one, in the same turn of the engine in which caches are cut off and the label changes. Registering each
version instead would leave requests in between without a model, and with vLLM's `load_inplace` each forward pass would
read the files.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from hubsync.chain import ChainReader, Plan
from hubsync.chain.replay import View, replay
from hubsync.errors import HubsyncError, ReplicaPoisoned, ReplicaRefused, WrongParent
from hubsync.format.manifest import Position, Run
from hubsync.format.parts import write_adapter

from .background import Background
from .engine import AdapterHost
from .frozen import FrozenModel, MemoryDigests, bits_by_name
from .served_model import CACHE_BYTES, exactly
from .sweep import first_names
from .vote import SingleWorker, WorkerGroup

logger = logging.getLogger("vllm.hubsync")

_SLICE = 1 << 21  # elements looked at at once in idle moments: about a millisecond of one thread
_LOOKS, _BETWEEN_LOOKS_S = 3, 0.02


class ServedAdapter:
    """`session.Served` of a LoRA adapter.

    It is `mapped` when a version is ready to be loaded, and has a position once the engine has loaded it: see
    `registered`.

    Args:
        find_host: asked when attaching; raises a HubsyncError if this process cannot be served.
        group: the workers of this engine.
    """

    remedy = "Restart this server"

    def __init__(self, find_host: Callable[[], AdapterHost], group: WorkerGroup | None = None):
        self.metrics: dict[str, float] = {}
        self.position: Position | None = None
        self.staged: Position | None = None
        self.verified = True  # are the engine's copies, and the base model, known to be as they were loaded?
        self.poisoned: str | None = None  # why the loaded adapter may differ from `position`
        self._base: FrozenModel | None = None
        self._copies = MemoryDigests({})
        self._sweep: Iterator[bool] = iter(())
        self._changes = 0  # how often it was loaded, or doubted
        self._loading = False
        self._find_host = find_host
        self._group = group or SingleWorker()
        self._host: AdapterHost | None = None
        self._reader: ChainReader | None = None
        self._view: View | None = None  # the version materialised last
        self._ready: Position | None = None  # where the link was pointed when attaching
        self._number: int | None = None  # the engine's number of the adapter, once it has loaded it
        self._before: Position | None = None  # for undo
        self._expected: Position | None = None  # being staged, or queued for it

    @property
    def run_id(self) -> str | None:
        return None if self._reader is None else self._reader.run().run_id

    @property
    def mapped(self) -> bool:
        return self._ready is not None

    @property
    def joined(self) -> bool:
        return self.position is not None

    def details(self) -> dict[str, Any]:
        """`adapter`: its name, and the path to register it with."""
        host = self._known_host()
        return {"adapter": None if host is None else {"name": host.name, "path": str(host.path)}}

    def layout(self) -> dict[str, Any]:
        raise ReplicaRefused("this server serves an adapter, which the engine stacks and scales: it has no layout")

    # --- attach -------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Materialise the version to be served, for the engine to load."""
        started = time.perf_counter()
        host = self._host = self._find_host()
        reader = host.source.open()
        run = reader.run()
        if run.adapter is None:
            raise ReplicaRefused(
                "this server runs with LoRA, which wraps the layers, and the run publishes a whole model; start it "
                "without --enable-lora"
            )
        host.loader.check(run)
        self._reader = reader
        if self._base is None:
            self._base = FrozenModel(host.loader.base())
        served = reader.served()
        self._materialise(served)
        _point(host.path, _directory(host, served))
        self._ready = served
        self.metrics["attach_s"] = time.perf_counter() - started

    def join(self, obstacle: HubsyncError | None) -> HubsyncError | None:
        raise ReplicaRefused(
            "this server serves an adapter, which vLLM has not loaded yet: call /v1/load_lora_adapter, with the name "
            "and path of hubsync_status"
        )

    def registered(self, number: int, load: Callable[[], bool]) -> None:
        """The engine is about to load the directory that the link points at. A collective of the engine's workers.

        If it fails on any of them, it fails on all, and all can be attached again. Call it within `Session.attempt`.

        Args:
            number: the engine's, of the adapter.
            load: loads it; returns whether it was taken.
        """
        try:
            with self._load_anew():
                self.position = self._load_together(self.position or self._ready, load)
                self._number = number
        except Exception:
            # The engine has dropped what it had before it was asked to load this: nothing is left to be poisoned.
            self._ready = self.position = self._before = self.poisoned = None
            raise
        self._take_for_right()
        logger.info("hubsync: serving the adapter of %s", self.position)

    def _load_together(self, own: Position | None, load: Callable[[], bool]) -> Position:
        """Have the engine load the link's directory for the first time. Returns its position. A collective."""
        ready = self._group.gather(own)
        if ready[0] is None or any(position != ready[0] for position in ready):
            raise WrongParent("the workers have no version to load yet, or different ones: attach again")
        failure = None
        try:
            if not load():
                failure = "the engine did not take it"
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        self._raise_first(failure)
        return ready[0]

    # --- stage --------------------------------------------------------------------------------------

    def expect(self, target: Position) -> None:
        if target not in (self.position, self.staged):
            self._expected = target

    def stage(self, target: Position, reading: AbstractContextManager[Any]) -> int:
        try:
            plan = self._materialise(target)
            self.staged = target
        finally:
            if self._expected == target:
                self._expected = None
        return plan.nbytes

    def discard(self) -> None:
        self.staged = None

    def _materialise(self, target: Position) -> Plan:
        """Write the directory of a version. Its digest is recomputed from the written files."""
        host, reader = self._attached()

        def find() -> Plan:
            have = None if self._view is None else self._view.position
            return exactly(reader.plan(have, to=target.version), target)

        plan, view = reader.carry_out(find, lambda plan: (plan, self._walk(reader, plan)))
        _write(_directory(host, target), reader.run(), view)
        reader.trim(CACHE_BYTES)
        return plan

    def _walk(self, reader: ChainReader, plan: Plan) -> View:
        view, self._view = self._view, None  # a failure on the path leaves it at no version
        if plan.start is None or view is None:
            view = replay(reader, plan)
        else:
            for step in plan.steps:
                view.apply(reader.patch(step.manifest, view.bits), step)
            view.verify()
        self._view = view
        return view

    # --- load ---------------------------------------------------------------------------------------

    def commit(self, target: Position) -> int:
        """Load what all ranks have staged, on all of them or on none. Returns elements of the adapter."""
        ready = self.position is not None and target in (self.position, self.staged)
        if not all(self._group.gather(ready)):
            raise ReplicaRefused(f"{target} is not staged on every worker: stage it, and commit again")
        before = self.position
        if target == before and all(self._group.gather(self.poisoned is None)):
            return 0
        try:
            self._move(target)
        except ReplicaRefused:
            self._delete(target)
            raise
        self._before = before
        if self.staged == target:  # else a later target has been staged meanwhile
            self.staged = None
        self._clean()
        _, reader = self._attached()
        return reader.run().table.numel

    def undo(self) -> Position:
        """Load the version before the last commit again."""
        before = self._before
        if not all(self._group.gather(before is not None)):
            raise ReplicaRefused("there is nothing to undo")
        assert before is not None
        self._move(before)
        self._before = None
        return before

    def doubt(self) -> None:
        self._changes += 1
        self.verified = False

    def verify(self) -> bool:
        if self.poisoned is not None:
            raise ReplicaPoisoned(f"what is served is not known to be right: {self.poisoned}")
        changes, base = self._changes, self._base
        assert base is not None
        wrong = [*base.differing(), *self._wrong_copies()]
        if self._loading or changes != self._changes:
            return False
        if wrong:
            self.poison(f"the base model or the adapter has changed in memory: {first_names(wrong)}")
            raise ReplicaPoisoned(f"what is served is not known to be right: {self.poisoned}")
        self.verified = True
        return True

    def verify_slice(self) -> bool:
        right = next(self._sweep, None)
        if right:
            return False
        self._sweep = iter(()) if self._base is None else self._base.digests.sweep(self._base.bits, _SLICE)
        return self.verify() if right is False or self._wrong_copies() else right is None

    def heal(self, background: Background) -> int:
        """Load the served version again, from its directory. The base model cannot be rebuilt."""
        assert self.position is not None, "only what is served is healed"
        self._load(self.position)
        assert self._base is not None
        if wrong := self._base.differing():
            raise ReplicaPoisoned(
                f"the base model that the adapter runs on has changed in memory ({first_names(wrong)}), and the run "
                "does not hold it"
            )
        self._take_for_right()
        _, reader = self._attached()
        return reader.run().table.numel

    def poison(self, reason: str) -> None:
        self.poisoned, self.verified = reason, False

    def _take_for_right(self) -> None:
        """The engine has just loaded it."""
        self.poisoned, self.verified = None, True

    def _wrong_copies(self) -> list[str]:
        """Names of the engine's copies that are not what they were. One that is just being made is looked at again."""
        host, _ = self._attached()
        assert self._number is not None
        wrong: list[str] = []
        for attempt in range(_LOOKS):
            if attempt:
                time.sleep(_BETWEEN_LOOKS_S)
            try:
                copies = bits_by_name(host.loader.copies(self._number))
                wrong = self._copies.differing(copies) if copies else ["the adapter, which the engine has dropped,"]
            except (KeyError, RuntimeError):  # the other thread has changed the engine's tables meanwhile
                continue
            if not wrong:
                break
        return wrong

    def _move(self, target: Position) -> None:
        """Load a materialised version on all ranks; where one cannot, all go back. A collective."""
        before, failure = self.position, None
        try:
            self._load(target)
        except Exception as error:
            failure = f"could not load the adapter of {target}: {type(error).__name__}: {error}"
        try:
            self._raise_first(failure)
        except ReplicaRefused as refusal:
            assert before is not None
            try:
                self._load(before)
            except Exception as error:
                self.poisoned = f"{refusal}; nor that of {before} again: {error}"
            raise
        self.position = target
        self._take_for_right()

    def _raise_first(self, failure: str | None) -> None:
        """ReplicaRefused, the same on all ranks, if any of them failed. A collective."""
        failures = [message for message in self._group.gather(failure) if message is not None]
        if failures:
            raise ReplicaRefused(failures[0])

    def _load(self, position: Position) -> None:
        host, _ = self._attached()
        assert self._number is not None
        directory = _directory(host, position)
        _point(host.path, directory)
        # Not the link: another engine of this server may move it.
        with self._load_anew():
            host.loader.load(host.name, self._number, directory)

    @contextmanager
    def _load_anew(self) -> Iterator[None]:
        """Around loading: what the engine then has made of the adapter is what it is to be from now on."""
        host, _ = self._attached()
        self._changes += 1  # what is being read meanwhile is neither right nor wrong
        self._loading = True
        try:
            yield
            assert self._number is not None
            self._copies = MemoryDigests(bits_by_name(host.loader.copies(self._number)))
        finally:
            self._loading = False

    # --- details ------------------------------------------------------------------------------------

    def _delete(self, target: Position) -> None:
        """Delete a staged version that could not be loaded. Staging it again writes it again."""
        host, _ = self._attached()
        if target != self.position:
            self.staged = None
            shutil.rmtree(_directory(host, target), ignore_errors=True)

    def _clean(self) -> None:
        """Delete directories of versions that no request can load without staging them again."""
        host, _ = self._attached()
        # Another worker may already have written the version staged here. Read in this order, because the other
        # thread moves a position from `_expected` to `staged`.
        positions = self.position, self._before, self._expected, self.staged
        kept = {_directory(host, position) for position in positions if position}
        for directory in host.directory.iterdir():
            if directory != host.path and not directory.name.startswith(".") and directory not in kept:
                shutil.rmtree(directory, ignore_errors=True)

    def _attached(self) -> tuple[AdapterHost, ChainReader]:
        assert self._host is not None
        assert self._reader is not None
        return self._host, self._reader

    def _known_host(self) -> AdapterHost | None:
        """Also before there is a run: clients ask for the adapter's name first."""
        if self._host is None:
            try:
                self._host = self._find_host()
            except HubsyncError:
                return None  # attaching reports it
        return self._host


def _directory(host: AdapterHost, position: Position) -> Path:
    return host.directory / f"{position.version:08d}-{position.digest}"


def _write(directory: Path, run: Run, view: View) -> None:
    """Write under a temporary name first: another worker of this server may be writing the same, or loading it."""
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
    """Point the link at a directory of the same parent, atomically. Other workers may do the same."""
    temporary = link.with_name(f".{link.name}-{secrets.token_hex(8)}")
    temporary.symlink_to(directory.name)
    temporary.replace(link)
