"""An endpoint plugin of vLLM beside hubsync's: `GET /v1/toy`."""

from __future__ import annotations

from typing import Any


class ToyEndpoint:
    name = "hubsync_toy"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        app.add_api_route("/v1/toy", _toy, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        pass


async def _toy() -> dict[str, bool]:
    return {"toy": True}
