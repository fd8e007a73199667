"""Where hubsync reaches into vLLM's engine core and API server. The only module but `compat` that knows vLLM's names.

`install` runs in every process of every vLLM server on a machine where hubsync is installed, so it wraps few functions,
and the wrappers pass on everything that is not hubsync's.

Used here, the same in vLLM 0.27 and 0.32: `EngineCore.collective_rpc`, `.scheduler` (`requests`, `running`,
`kv_cache_manager.coordinator.single_type_managers`, `reset_prefix_cache`, `reset_connector_cache`), `.batch_queue`,
`.resume_scheduler`, `.is_scheduler_paused`, `.reset_encoder_cache`, `.set_weight_version`;
`EngineCoreProc._handle_client_request` and `.input_queue`; `BlockPool` as in `_forget_blocks`; `Request.block_hashes`
and `.cache_salt`; `DPLBAsyncMPClient._call_utility_async`; `WeightTransferEngineFactory`. Not in 0.27, and only used
where it is: `EngineCore._attach_weight_version`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from hubsync.apply.engine_commit import NATIVE, Answers, Core, intervals
from hubsync.apply.protocol import KV_POLICIES, METHOD_PREFIX, WINDOW_TIMEOUT_S, KvPolicy

BACKEND = "hubsync"

logger = logging.getLogger("vllm.hubsync")


class _CoreTurn:
    """Type of the requests in the core's input queue that are hubsync's own: a function to call."""


def install() -> None:
    """Wrap what hubsync needs, once per process. Anything that vLLM has renamed is reported, and left alone."""
    for hook in (_hook_core, _hook_data_parallel_client, _register_backend, _hook_packing):
        try:
            hook()
        except (ImportError, AttributeError) as error:
            logger.warning("hubsync: this vLLM is not known to hubsync (%s), so it cannot follow a run", error)


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace `owner.name` by `wrapper(owner.name)`, unless that was done before."""
    original = getattr(owner, name)
    if not hasattr(original, "_hubsync_original"):
        wrapped = functools.wraps(original)(wrapper(original))
        wrapped._hubsync_original = original  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)


# --- engine core ------------------------------------------------------------------------------------


def _hook_core() -> None:
    from vllm.v1.engine import core

    _wrap(core.EngineCore, "collective_rpc", _collective_rpc)
    _wrap(core.EngineCoreProc, "_handle_client_request", _handle_client_request)
    _wrap(core.DPEngineCoreProc, "resume_scheduler", _resume_scheduler)
    if hasattr(core.EngineCore, "_attach_weight_version"):
        _wrap(core.EngineCore, "_attach_weight_version", _attach_weight_version)


def _collective_rpc(original: Callable[..., Any]) -> Callable[..., Any]:
    def collective_rpc(
        self: Any, method: Any, timeout: float | None = None, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if isinstance(method, str):
            if method.startswith(METHOD_PREFIX):
                return _core_of(self, original).handle(method, *args, **kwargs or {})
            if method in NATIVE and uses_backend(self.vllm_config):
                return _core_of(self, original).handle_native(method, *args, **kwargs or {})
        return original(self, method, timeout, args, kwargs)

    return collective_rpc


def _handle_client_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def handle_client_request(self: Any, request_type: Any, request: Any) -> Any:
        if request_type is not _CoreTurn:
            return original(self, request_type, request)
        try:
            request()
        except Exception:  # no client is there to be told
            logger.exception("hubsync: a background turn of the engine failed")

    return handle_client_request


def _resume_scheduler(original: Callable[..., Any]) -> Callable[..., Any]:
    def resume_scheduler(self: Any) -> Any:
        # Resuming waits for all data parallel engines. One that its watchdog has resumed before must not wait again.
        if "_hubsync" in self.__dict__ and not self.is_scheduler_paused():
            return None
        return original(self)

    return resume_scheduler


def _attach_weight_version(original: Callable[..., Any]) -> Callable[..., Any]:
    def attach_weight_version(self: Any, outputs: dict[int, Any]) -> Any:
        engine: VLLMEngine | None = self.__dict__.get("_hubsync_engine")
        if engine is None or not engine.labels_in_flight:
            return original(self, outputs)
        label = engine.labels_in_flight.popleft()
        for output in outputs.values():
            output.weight_version = label

    return attach_weight_version


def _core_of(engine_core: Any, collective_rpc: Callable[..., Any]) -> Core:
    """hubsync's part of an engine core, made at its first request."""
    core: Core | None = engine_core.__dict__.get("_hubsync")
    if core is None:
        engine_core._hubsync_engine = VLLMEngine(engine_core, functools.partial(collective_rpc, engine_core))
        core = Core(engine_core._hubsync_engine, _settings(engine_core.vllm_config))
        engine_core._hubsync = core
    return core


class VLLMEngine:
    """`hubsync.apply.engine_commit.Engine` on vLLM's engine core.

    Args:
        core: the EngineCore.
        collective_rpc: calls its workers; vLLM's own.
    """

    def __init__(self, core: Any, collective_rpc: Callable[..., list[Any]]):
        self.index = int(getattr(core, "engine_index", 0))
        self.labels_in_flight: deque[str] = deque()  # of batches whose forward pass began before the label changed
        self._core = core
        self._rpc = collective_rpc
        parallel = core.vllm_config.parallel_config
        self._spans_engines = parallel.data_parallel_size > 1  # 1 where the engines of a server are independent
        self._stages = parallel.pipeline_parallel_size > 1

    @property
    def alone(self) -> bool:
        return not self._spans_engines

    @property
    def still(self) -> bool:
        core = self._core
        pausing = getattr(core, "pending_pause", False) or core.engines_running
        return self.paused and not pausing and not core.batch_queue

    def settle(self) -> None:
        if self._stages:
            for answer, *_ in self._core.batch_queue or ():
                answer.result()  # the core gets the same when it comes to it

    @property
    def paused(self) -> bool:
        return bool(self._core.is_scheduler_paused())

    @property
    def label(self) -> str:
        return str(getattr(self._core, "_weight_version", ""))  # none in 0.26

    def call(self, method: str, *args: Any, **kwargs: Any) -> Answers:
        return self._rpc(method, None, args, kwargs)

    def native(self, step: str, *args: Any) -> Answers:
        from . import worker

        return self._rpc(getattr(worker, step), None, args, None)

    def recompute(self) -> None:
        if not self._core.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
            raise RuntimeError("the KV connector would not drop its cache")
        self._reset_encoder_cache()

    def isolate(self) -> None:
        scheduler = self._core.scheduler
        if not scheduler.reset_connector_cache():
            raise RuntimeError("the KV connector would not drop its cache")
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        for pool in {id(manager.block_pool): manager.block_pool for manager in managers}.values():
            _forget_blocks(pool)
        running = {request.request_id for request in scheduler.running}
        for request in scheduler.requests.values():
            # A waiting one may hold blocks too, whose content is still being transferred.
            if request.request_id in running or request.num_computed_tokens > 0:
                _set_apart(request)
        self._reset_encoder_cache()

    def _reset_encoder_cache(self) -> None:
        if self._core.vllm_config.model_config.is_multimodal_model:
            self._core.reset_encoder_cache()

    def set_label(self, version: str) -> None:
        if not hasattr(self._core, "set_weight_version"):
            return  # vLLM 0.26 states no versions
        in_flight = len(self._core.batch_queue or ())
        while len(self.labels_in_flight) < in_flight:
            self.labels_in_flight.append(self.label)
        self._core.set_weight_version(version)

    def resume(self) -> None:
        if self._core.model_executor.is_sleeping:
            raise RuntimeError("this server sleeps: wake it up")
        self._core.resume_scheduler()

    def later(self, seconds: float, turn: Callable[[], None]) -> Callable[[], None]:
        inbox = getattr(self._core, "input_queue", None)
        if inbox is None:  # in the process that uses it, and dies with that
            return lambda: None
        timer = threading.Timer(seconds, inbox.put_nowait, [(_CoreTurn, turn)])
        timer.daemon = True
        timer.start()
        return timer.cancel

    def until(self, look: Callable[[], bool]) -> Future[None] | None:
        pauses = intervals()
        if not hasattr(self._core, "input_queue"):
            while not look():
                time.sleep(pauses())
            return None
        future: Future[None] = Future()

        def turn() -> None:
            try:
                if look():
                    future.set_result(None)
                else:
                    self.later(pauses(), turn)
            except Exception as error:
                future.set_exception(error)

        turn()
        return future


def _forget_blocks(pool: Any) -> None:
    """Take all blocks out of the prefix cache. Those that requests hold stay theirs.

    This is `BlockPool.reset_prefix_cache` without its condition that no block is in use. `evict_blocks` has none, but
    takes 20 times as long.
    """
    pool.cached_block_hash_to_block = type(pool.cached_block_hash_to_block)()
    getattr(pool, "cached_block_hashes_by_block", {}).clear()
    for block in pool.blocks:
        block.reset_hash()
    if pool.metrics_collector:
        pool.metrics_collector.reset()
    if pool.enable_kv_cache_events:
        from vllm.distributed.kv_events import AllBlocksCleared

        pool.kv_event_queue.append(AllBlocksCleared())


def _set_apart(request: Any) -> None:
    """Cache what this request computes from now on under names that no other request asks for.

    The name of a block is a hash of its tokens and of the block before it, so it is enough to change those that are
    there, or, if there are none yet, what goes into the first.
    """
    request.cache_salt = os.urandom(16).hex()
    request.block_hashes[:] = [os.urandom(len(name)) for name in request.block_hashes]


# --- API server -------------------------------------------------------------------------------------


def _hook_data_parallel_client() -> None:
    from vllm.v1.engine import core_client

    _wrap(core_client.DPLBAsyncMPClient, "collective_rpc_async", _collective_rpc_async)


def _collective_rpc_async(original: Callable[..., Any]) -> Callable[..., Any]:
    async def collective_rpc_async(
        self: Any, method: Any, timeout: float | None = None, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The answers of all engines, where vLLM gives those of the first."""
        if not (isinstance(method, str) and method.startswith(METHOD_PREFIX)):
            return await original(self, method, timeout, args, kwargs)
        calls = [
            self._call_utility_async("collective_rpc", method, timeout, args, kwargs, engine=engine)
            for engine in self.core_engines
        ]
        return [answer for answers in await asyncio.gather(*calls) for answer in answers]

    return collective_rpc_async


# --- weight transfer backend, and what it needs of workers ---------------------------------------------


def _register_backend() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "vllm_plugin.backend", "HubsyncWeightTransferEngine")


def uses_backend(config: Any) -> bool:
    """Was this server started with `--weight-transfer-config '{"backend": "hubsync"}'`?"""
    transfer = getattr(config, "weight_transfer_config", None)
    return transfer is not None and transfer.backend == BACKEND


def _hook_packing() -> None:
    """On CPU builds, keep weights live in servers that use the backend (the worker extension sees to that itself)."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers import utils

    def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
        def dispatch_cpu_unquantized_gemm(*args: Any, **kwargs: Any) -> Any:
            if uses_backend(get_current_vllm_config()):
                from .compat import keep_linears_live

                keep_linears_live()
            return original(*args, **kwargs)

        return dispatch_cpu_unquantized_gemm

    _wrap(utils, "dispatch_cpu_unquantized_gemm", wrapper)


# --- settings ---------------------------------------------------------------------------------------


def _settings(config: Any) -> tuple[float, str]:
    """(seconds after which a commit window counts as abandoned, KV policy of the backend), pinned at launch.

    A mistyped setting does not keep a server from being asked what is wrong with it: it is logged, and not followed.
    """
    extra = config.additional_config if isinstance(config.additional_config, dict) else {}
    pinned = extra.get("hubsync", {})
    pinned = pinned if isinstance(pinned, dict) else {}  # the workers refuse to attach, with the reason
    timeout = pinned.get("window_timeout") or os.environ.get("HUBSYNC_WINDOW_TIMEOUT") or WINDOW_TIMEOUT_S
    policy = pinned.get("kv_cache") or os.environ.get("HUBSYNC_KV_CACHE") or KvPolicy.RECOMPUTE
    try:
        seconds = float(timeout)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        logger.error("hubsync: window_timeout must be a number of seconds above 0, not %r", timeout)
        seconds = WINDOW_TIMEOUT_S
    if policy not in KV_POLICIES:
        logger.error("hubsync: kv_cache must be one of %s, not %r", ", ".join(KV_POLICIES), policy)
        policy = KvPolicy.RECOMPUTE
    return seconds, policy
