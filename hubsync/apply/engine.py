"""Contract with an inference engine: everything an engine provides so that its weights can follow a run.

`hubsync.apply` knows no engine. An integration is a separate folder, as `vllm_plugin` is for vLLM, and connects two
places:

Worker processes hold weights. Each worker
    * makes one `session.Session`, of a `served_model.ServedModel` (needs a `ModelHost`) or of a
      `served_adapter.ServedAdapter` (needs an `AdapterHost`), with the `vote.WorkerGroup` of its engine;
    * exposes the methods of `worker_methods.WorkerMethods` to clients, called between two forward passes;
    * calls `Session.before_forward` ahead of every forward pass, on the same thread;
    * calls `Session.weights_away` before, and `Session.weights_back` after, anything else that may change its weights.

The engine core schedules forward passes. It
    * implements `EngineCore`, and makes one `engine_commit.EngineCommit` of it;
    * routes every `hubsync_*` request of a client through `EngineCommit.handle`, but `hubsync_wait` through
      `EngineCommit.wait`, and answers a Future when it is complete.

Clients reach either through a `hubsync.replicas.server.InferenceServer`.

Importing this module imports no torch, so that processes without a model can use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hubsync.format.keys import PublicKey
from hubsync.format.manifest import Run

if TYPE_CHECKING:
    import torch

    from hubsync.chain import ChainReader

    from .live import LayoutHints

Answers = list[dict[str, Any]]
"""One answer of each worker, in rank order."""


# --- workers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunSource:
    """Where a worker reads its run from, as pinned when the server is started.

    Attributes:
        bucket: address of the run.
        cache: directory for downloads. Several workers may share it.
        public_key: documents of the run that this key has not signed are rejected. None accepts all.
        max_head_age: see `ChainReader`.
    """

    bucket: str
    cache: Path
    public_key: PublicKey | None = None
    max_head_age: float | None = None

    def open(self) -> ChainReader:
        """A reader of the run. Raises BucketError or ConfigError for an address that does not work."""
        from hubsync.bucket import open_bucket
        from hubsync.chain import ChainReader

        bucket = open_bucket(self.bucket, key=self.public_key)
        return ChainReader(bucket, self.cache, max_head_age=self.max_head_age)


@dataclass(frozen=True)
class ModelHost:
    """A worker that serves a whole model.

    Attributes:
        source: the run.
        models: the loaded module, and a draft module whose weights are part of the same checkpoint; each with
            `load_weights`.
        device: where their parameters are.
        checkpoint: directory of the safetensors checkpoint that was loaded, if it is on this machine. If it is the
            run's base model it can replace an anchor.
        hints: what the engine knows of its layout. None: nothing.
        dense_fallback: load tensors whole that cannot be followed in place? Otherwise they are refused.
        serving: returns the modules that forward passes run now, as in `models`; they are others once an engine has
            loaded its model again. None: they never are.
    """

    source: RunSource
    models: tuple[torch.nn.Module, ...]
    device: torch.device
    checkpoint: Path | None = None
    hints: LayoutHints | None = None
    dense_fallback: bool = False
    serving: Callable[[], tuple[torch.nn.Module, ...]] | None = None


class AdapterLoader(Protocol):
    """The engine's manager of LoRA adapters in one worker."""

    def check(self, run: Run) -> None:
        """ReplicaRefused if it cannot serve adapters of the run."""
        ...

    def load(self, name: str, number: int, path: Path) -> None:
        """Load the directory at `path` in place of the adapter that is loaded as `number`. May raise anything."""
        ...

    def base(self) -> Sequence[torch.nn.Module]:
        """The modules of the model that is adapted."""
        ...

    def copies(self, number: int) -> Mapping[str, torch.Tensor]:
        """Every tensor that the engine has made of the adapter `number`, as it is now; empty if it has dropped it.

        Copies may come and go, and be made again, on the thread of the forward passes.
        """
        ...


@dataclass(frozen=True)
class AdapterHost:
    """A worker that serves a LoRA adapter.

    Attributes:
        source: the run.
        loader: the engine's manager of adapters.
        directory: of this server's adapters. Its workers share it, and no other server uses it.
        name: of the adapter in requests.
    """

    source: RunSource
    loader: AdapterLoader
    directory: Path
    name: str

    @property
    def path(self) -> Path:
        """The path that clients register with the engine: a link to the version that is served."""
        return self.directory / "current"


# --- engine core ------------------------------------------------------------------------------------


class EngineCore(Protocol):
    """One scheduling loop and its workers. All methods are called on the thread that schedules."""

    index: int
    """Of the engine among the data parallel engines of its server."""

    @property
    def alone(self) -> bool:
        """Can this engine's forward passes end without those of other engines?"""
        ...

    @property
    def still(self) -> bool:
        """Is this engine paused, with all others that it shares forward passes with, and none under way?"""
        ...

    def settle(self) -> None:
        """Return when no worker is in a forward pass, or when all get the next request between the same two passes."""
        ...

    @property
    def paused(self) -> bool: ...

    @property
    def asleep(self) -> bool:
        """Are the weights not in memory, so that nothing may read them?"""
        ...

    @property
    def label(self) -> str:
        """The version that responses state."""
        ...

    def call(self, method: str, *args: Any, **kwargs: Any) -> Answers:
        """Call one of `worker_methods.WorkerMethods` on all workers."""
        ...

    def statuses(self) -> Answers:
        """The statuses of all workers. Unlike `hubsync_status`, asking has no effect."""
        ...

    def recompute(self) -> None:
        """Preempt running requests and drop all keys and values."""
        ...

    def isolate(self) -> None:
        """Keep running requests, and hide from all others the keys and values that these have and will compute."""
        ...

    def set_label(self, version: str) -> None:
        """Set the version that outputs of forward passes state, from the next pass on."""
        ...

    def resume(self) -> None: ...

    def until(self, reached: Callable[[], bool]) -> Future[None] | None:
        """Call `reached` on the scheduling thread, at least after each background job of a worker, until it is True or
        raises. None if that has happened when this returns; else a Future of it, completed on that thread.
        """
        ...

    def later(self, seconds: float, turn: Callable[[], None]) -> Callable[[], None]:
        """Call `turn` on the scheduling thread after `seconds`. Returns a function that cancels it."""
        ...
