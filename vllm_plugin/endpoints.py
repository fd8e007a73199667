"""Control endpoints under `/v1/hubsync`: an endpoint plugin of vLLM (`vllm.endpoint_plugins`).

    VLLM_PLUGINS=hubsync vllm serve MODEL --api-key KEY --worker-extension-cls vllm_plugin.DeltaWorkerExtension

vLLM guards every path under `/v1` with the server's API key. So a trainer or follower that knows the key can drive the
server, and no development endpoint needs to be open (`VLLM_SERVER_DEV_MODE`). vLLM loads an endpoint plugin only if
`VLLM_PLUGINS` names it. docs/protocol.md has the table of paths.

Used here, the same in vLLM 0.26 to 0.33: the contract in `vllm.plugins.endpoint_plugins.interface`, and of the engine
client `collective_rpc`, `generate`, `pause_generation`, `resume_generation`, `is_paused` and `vllm_config`; where it
exists, `get_weight_version`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

import hubsync
from hubsync.apply.protocol import CONTROL_PATH, PARAMETERS, PROTOCOL, WorkerMethod, control_path
from hubsync.errors import FormatError

from .demands import VersionDemands, Versions, recording
from .metrics import ServerMetrics

_LARGEST_BODY = 1 << 16  # bytes; arguments are a version, a digest and a token


class ControlEndpoints:
    """The plugin. vLLM makes one in each API server process.

    Attributes:
        name: that `VLLM_PLUGINS` must have.
        required_tasks: of servers that load it.
    """

    name = "hubsync"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None

    def attach_router(self, app: FastAPI) -> None:
        app.add_middleware(VersionDemands, current=self._versions)
        app.add_api_route(CONTROL_PATH, self._about, methods=["GET"])
        for method in PARAMETERS:
            verbs = ["GET", "POST"] if method == WorkerMethod.STATUS else ["POST"]
            app.add_api_route(control_path(method), self._worker_call(method), methods=verbs, name=method)
        for path, verb, answer in (
            ("pause", "POST", self._pause),
            ("resume", "POST", self._resume),
            ("is_paused", "GET", self._is_paused),
            ("weight_info", "GET", self._weight_info),
            ("get_world_size", "GET", self._world_size),
        ):
            app.add_api_route(f"{CONTROL_PATH}/{path}", answer, methods=[verb])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        self._engine = engine_client
        engine_client.generate = recording(engine_client.generate)
        names = engine_client.vllm_config.model_config.served_model_name
        metrics = ServerMetrics(str(names[0] if isinstance(names, list) else names))
        engine_client.collective_rpc = metrics.observing(engine_client.collective_rpc)

    async def _versions(self) -> Versions | None:
        """The oldest and the newest version that the workers serve now; None if that is no version of the run."""
        if hasattr(self._engine, "get_weight_version"):
            label = str(await self._engine.get_weight_version())
            return (int(label), int(label)) if label.isdecimal() else None
        ranks = await self._engine.collective_rpc(WorkerMethod.STATUS)  # before 0.28
        served = [rank.get("version") for rank in ranks]
        return None if None in served else (min(served), max(served))

    async def _about(self) -> JSONResponse:
        from .compat import vllm_version

        config = self._engine.vllm_config
        versions = {"protocol": PROTOCOL, "hubsync": hubsync.__version__, "vllm": vllm_version()}
        workers, logprobs = config.parallel_config.world_size_across_dp, str(config.model_config.logprobs_mode)
        return JSONResponse({**versions, "world_size": workers, "logprobs_mode": logprobs})

    def _worker_call(self, method: str) -> Callable[[Request], Awaitable[JSONResponse]]:
        async def call(request: Request) -> JSONResponse:
            try:
                arguments = _arguments(await request.body(), PARAMETERS[method])
            except FormatError as error:
                document = {"message": str(error), "type": type(error).__name__, "code": 400}
                return JSONResponse({"error": document}, status_code=400)
            return JSONResponse({"results": await self._engine.collective_rpc(method, kwargs=arguments)})

        call.__doc__ = f"`{method}` of every worker: see docs/protocol.md of hubsync."
        return call

    async def _pause(self) -> JSONResponse:
        """Freeze all requests between two forward passes. Their KV caches stay."""
        await self._engine.pause_generation(mode="keep", clear_cache=False)
        return JSONResponse({"status": "paused"})

    async def _resume(self) -> JSONResponse:
        await self._engine.resume_generation()
        return JSONResponse({"status": "resumed"})

    async def _is_paused(self) -> JSONResponse:
        return JSONResponse({"is_paused": await self._engine.is_paused()})

    async def _weight_info(self) -> JSONResponse:
        """The version that answers state, if this vLLM has that."""
        known = hasattr(self._engine, "get_weight_version")
        return JSONResponse({"weight_version": await self._engine.get_weight_version() if known else None})

    async def _world_size(self) -> JSONResponse:
        return JSONResponse({"world_size": self._engine.vllm_config.parallel_config.world_size_across_dp})


def _arguments(body: bytes, known: tuple[str, ...]) -> dict[str, Any]:
    """The named arguments in a request's body, or FormatError. The workers check their values."""
    if len(body) > _LARGEST_BODY:
        raise FormatError(f"the body has {len(body)} bytes, more than {_LARGEST_BODY}")
    try:
        document = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or not document.keys() <= set(known):
        raise FormatError(f"the body must be a JSON object with {', '.join(known) or 'nothing'}, not {body[:80]!r}")
    return document
