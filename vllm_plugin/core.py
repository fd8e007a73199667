"""What hubsync does around the workers, in the processes that schedule requests.

Workers hold weights; requests, cached keys and values and the version label live in vLLM's engine core, one process in
front of the workers. A call to the workers goes through `EngineCore.collective_rpc`, between two steps of the engine,
so that is where the rest of a commit belongs. `install` puts a layer around that method and three others. It acts on
methods of hubsync only, and on vLLM's own weight transfer calls where the server was started with our backend; servers
that do not use hubsync run as before.

- **Commit, keeping caches** (`hubsync_commit(..., "keep")`): in the same call that changes the weights the core sets
  the version label and takes every cached block out of the prefix cache. So no request that comes later shares a block
  that old weights have filled. What remains: a request that is running goes on with its own keys and values, and blocks
  that it fills after the commit may be shared.
- **Pipeline stages, and experts spread over engines**: a forward pass is not between the same two requests everywhere,
  so a commit is refused unless the engine is paused.
- **Watchdog**: a client that has opened a commit window, paused the engine and died leaves it paused. After
  `window_timeout` seconds the core completes the window itself, as the next client would.
- **Data parallel**: vLLM sends a call to all engines, and returns the answers of the first. For ours it returns all.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

from . import compat

logger = logging.getLogger("vllm.hubsync")

Answers = list[dict[str, Any]]


def install() -> None:
    """Put the layer around the classes of vLLM that matter in this process. Idempotent."""
    if "vllm.engine.arg_utils" in sys.modules and "vllm.v1.worker.worker_base" not in sys.modules:
        importlib.import_module("vllm.v1.engine.core_client")  # a front end, which is about to load it anyway
    core = sys.modules.get("vllm.v1.engine.core")
    if core is not None:
        _wrap(core.EngineCore, "collective_rpc", _collective_rpc)
        _wrap(core.EngineCoreProc, "_handle_client_request", _handle_client_request)
    client = sys.modules.get("vllm.v1.engine.core_client")
    if client is not None:
        _wrap(client.DPLBAsyncMPClient, "call_utility_async", _call_utility_async)


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    original = owner.__dict__.get(name)
    if original is None or hasattr(original, "_hubsync"):
        return  # vLLM has moved it: statuses will lack "core", and clients say so

    @functools.wraps(original)
    def layered(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(self, original, *args, **kwargs)

    layered._hubsync = True  # type: ignore[attr-defined]
    setattr(owner, name, layered)


# --- engine core ------------------------------------------------------------------------------------


def _collective_rpc(
    core: Any, original: Callable[..., Any], method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None
) -> Any:
    def call(method: Any, *args: Any) -> Any:
        return original(core, method, timeout, args, None)

    if isinstance(method, str) and method in compat.WEIGHT_TRANSFER_CALLS and compat.is_native(core.vllm_config):
        return _native(call, lambda: original(core, method, timeout, args, kwargs))
    if not (isinstance(method, str) and method.startswith("hubsync_")):
        return original(core, method, timeout, args, kwargs)
    if method == "hubsync_commit" and not _may_commit(core):
        return _refused(core, "this server must be paused for a commit: a forward pass spans stages or engines")
    answers: Answers = original(core, method, timeout, args, kwargs)
    failed = any(answer.get("error") for answer in answers)
    if method == "hubsync_open" and not failed:
        _watch(core, call, str(args[2]))
    elif method == "hubsync_close" and not failed:
        _unwatch(core)
    elif method == "hubsync_commit" and not failed and args[2:] == ["keep"]:
        _label(core, args[0])
        compat.forget_cached_blocks(core)
    engine = {"core": True, "engine": int(getattr(core, "engine_index", 0))}
    return [{**answer, **engine} for answer in answers]


def _may_commit(core: Any) -> bool:
    parallel = compat.parallel_of(core.vllm_config)
    return (parallel["pp"] == 1 and parallel["dp"] == 1) or core.is_scheduler_paused()


def _refused(core: Any, message: str) -> Answers:
    error = {"type": "ReplicaRefused", "message": message}
    return [{"error": error} for _ in range(core.vllm_config.parallel_config.world_size)]


def _label(core: Any, version: Any) -> None:
    core.set_weight_version(str(version))


# --- watchdog ---------------------------------------------------------------------------------------


class _Window:
    """A request to ourselves, to complete a commit window on the thread that runs the engine."""

    def __init__(self, call: Callable[..., Any], token: str):
        self.call = call
        self.token = token


def _watch(core: Any, call: Callable[..., Any], token: str) -> None:
    _unwatch(core)
    if not hasattr(core, "input_queue"):  # an engine inside the client's own process dies with it
        return
    window = _Window(call, token)
    timer = threading.Timer(compat.window_timeout(core.vllm_config), core.input_queue.put_nowait, [(window, None)])
    timer.daemon = True
    timer.start()
    core._hubsync_watchdog = timer


def _unwatch(core: Any) -> None:
    timer: threading.Timer | None = getattr(core, "_hubsync_watchdog", None)
    if timer is not None:
        timer.cancel()
    core._hubsync_watchdog = None


def _handle_client_request(core: Any, original: Callable[..., Any], request_type: Any, request: Any) -> Any:
    if not isinstance(request_type, _Window):
        return original(core, request_type, request)
    try:
        _complete(core, request_type)
    except Exception:
        logger.exception("hubsync: could not complete a commit window that a client has left open; trying again")
        _watch(core, request_type.call, request_type.token)


def _complete(core: Any, window: _Window) -> None:
    """What a client does after its commit, for one that has not come back. Every step may be repeated."""
    statuses: Answers = window.call("hubsync_status")
    open_windows = [status["window"] for status in statuses if status.get("window")]
    if not any(found["token"] == window.token for found in open_windows):
        return
    position = open_windows[0]["version"], open_windows[0]["digest"]
    arrived = [(status["version"], status["digest"]) == position for status in statuses]
    logger.warning(
        "hubsync: a client opened a commit window to version %s and has not closed it; %s and resuming",
        position[0],
        "completing the commit" if any(arrived) else "leaving the weights as they are",
    )
    if any(arrived) and not all(arrived):
        window.call("hubsync_commit", *position)
    if any(arrived):
        _label(core, position[0])
        core._reset_caches()
    core.resume_scheduler()
    window.call("hubsync_close", window.token)
    _unwatch(core)


# --- vLLM's own weight transfer calls ---------------------------------------------------------------


def _native(call: Callable[..., Any], run: Callable[[], Any]) -> Any:
    """One of vLLM's calls with our backend. Workers never raise, so that their answers stay in step; this does."""
    from . import worker

    call(worker.session_of)
    answers = run()
    failures = [failure for failure in call(worker.take_native_failure) if failure is not None]
    if failures:
        raise RuntimeError(f"hubsync: {failures[0]}")
    return answers


# --- API server -------------------------------------------------------------------------------------


async def _call_utility_async(client: Any, original: Callable[..., Any], method: str, *args: Any) -> Any:
    if method != "collective_rpc" or not (args and isinstance(args[0], str) and args[0].startswith("hubsync_")):
        return await original(client, method, *args)
    calls = [client._call_utility_async(method, *args, engine=engine) for engine in client.core_engines]
    return [answer for answers in await asyncio.gather(*calls) for answer in answers]
