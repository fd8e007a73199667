"""Hooks of vLLM's engine core and API server. With `engine_core` and `compat` the only code that knows vLLM's names.

`install` runs in every process of every vLLM server on a machine where hubsync is installed, so it wraps few functions,
and the wrappers pass on every request that is not hubsync's.

Used here, the same in vLLM 0.27 and 0.32: `EngineCore.collective_rpc`, `EngineCoreProc._handle_client_request`,
`DPEngineCoreProc.resume_scheduler`, `DPLBAsyncMPClient.collective_rpc_async` and `._call_utility_async`;
`WeightTransferEngineFactory`. Not in 0.27, and only used where it exists: `EngineCore._attach_weight_version`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hubsync.apply.engine_commit import EngineCommit
from hubsync.apply.protocol import METHOD_PREFIX, WorkerMethod

from . import native
from .engine_core import CoreTurn, VLLMEngineCore
from .settings import read_settings

BACKEND = "hubsync"

logger = logging.getLogger("vllm.hubsync")


def install() -> None:
    """Wrap vLLM's functions, once per process. A function that vLLM has renamed is reported and left alone."""
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


@dataclass(frozen=True)
class _Parts:
    """hubsync's part of one engine core."""

    engine: VLLMEngineCore
    commit: EngineCommit
    native: native.NativeCalls


def _parts_of(engine_core: Any, collective_rpc: Callable[..., Any]) -> _Parts:
    """Made at the first request."""
    parts: _Parts | None = engine_core.__dict__.get("_hubsync")
    if parts is None:
        settings = read_settings(engine_core.vllm_config)
        for sentence in settings.ignored:
            logger.error("hubsync: %s", sentence)
        engine = VLLMEngineCore(engine_core, functools.partial(collective_rpc, engine_core))
        commit = EngineCommit(engine, settings.window_timeout)
        parts = engine_core._hubsync = _Parts(engine, commit, native.NativeCalls(engine, commit, settings.kv_cache))
    return parts


def _collective_rpc(original: Callable[..., Any]) -> Callable[..., Any]:
    def collective_rpc(
        self: Any, method: Any, timeout: float | None = None, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if isinstance(method, str):
            if method == WorkerMethod.WAIT:
                return _parts_of(self, original).commit.wait(*args, **kwargs or {})
            if method.startswith(METHOD_PREFIX):
                return _parts_of(self, original).commit.handle(method, *args, **kwargs or {})
            if method in native.METHODS and uses_backend(self.vllm_config):
                return _parts_of(self, original).native.handle(method, *args, **kwargs or {})
        return original(self, method, timeout, args, kwargs)

    return collective_rpc


def _handle_client_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def handle_client_request(self: Any, request_type: Any, request: Any) -> Any:
        if request_type is not CoreTurn:
            return original(self, request_type, request)
        try:
            request()
        except Exception:  # no client waits for an answer
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
        parts: _Parts | None = self.__dict__.get("_hubsync")
        if parts is None or not parts.engine.labels_in_flight:
            return original(self, outputs)
        label = parts.engine.labels_in_flight.popleft()
        for output in outputs.values():
            output.weight_version = label

    return attach_weight_version


# --- API server -------------------------------------------------------------------------------------


def _hook_data_parallel_client() -> None:
    from vllm.v1.engine import core_client

    _wrap(core_client.DPLBAsyncMPClient, "collective_rpc_async", _collective_rpc_async)


def _collective_rpc_async(original: Callable[..., Any]) -> Callable[..., Any]:
    async def collective_rpc_async(
        self: Any, method: Any, timeout: float | None = None, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The answers of all engines. vLLM returns those of the first."""
        if not (isinstance(method, str) and method.startswith(METHOD_PREFIX)):
            return await original(self, method, timeout, args, kwargs)
        calls = [
            self._call_utility_async("collective_rpc", method, timeout, args, kwargs, engine=engine)
            for engine in self.core_engines
        ]
        return [answer for answers in await asyncio.gather(*calls) for answer in answers]

    return collective_rpc_async


# --- weight transfer backend -------------------------------------------------------------------------


def _register_backend() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "vllm_plugin.backend", "HubsyncWeightTransferEngine")


def uses_backend(config: Any) -> bool:
    """Was this server started with `--weight-transfer-config '{"backend": "hubsync"}'`?"""
    transfer = getattr(config, "weight_transfer_config", None)
    return transfer is not None and transfer.backend == BACKEND


def _hook_packing() -> None:
    """On CPU builds, keep weights live in servers that use the backend. The worker extension does so by itself."""
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
