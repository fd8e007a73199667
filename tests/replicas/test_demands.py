"""Requests that demand a version, in a FastAPI application around an engine that is a stand-in.

`tests/servers/test_sampler_vllm.py` has them on a real vLLM server that commits meanwhile.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient

from vllm_plugin import endpoints
from vllm_plugin.endpoints import ControlEndpoints
from vllm_plugin.metrics import ServerMetrics


@pytest.fixture(autouse=True)
def _registry_of_each_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has one server, and so one set of series; this one has many."""
    prometheus = pytest.importorskip("prometheus_client")
    monkeypatch.setattr(endpoints, "ServerMetrics", lambda name: ServerMetrics(name, prometheus.CollectorRegistry()))


class Engine:
    """What the endpoints use of vLLM's engine client: it commits `to` in the middle of an answer."""

    def __init__(self, version: str, to: str | None = None, *, states: bool = True):
        self.version, self.to, self.states, self.generated = version, to, states, 0
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(served_model_name="m"))
        if states:
            self.get_weight_version = self._version

    async def _version(self) -> str:
        return self.version

    async def collective_rpc(self, method: str, *_: Any) -> list[dict[str, Any]]:
        return [{"version": int(self.version) if self.version.isdecimal() else None, "error": None}]

    async def generate(self, request_id: str) -> AsyncIterator[Any]:
        self.generated += 1
        before, self.version = self.version, self.to or self.version
        spans = [{"version": before, "start": 0, "end": 2}]
        spans += [{"version": self.to, "start": 2, "end": 4}] if self.to else []
        for done in (False, True):
            await asyncio.sleep(0)
            choice = SimpleNamespace(index=0, weight_versions=spans if done and self.states else None)
            yield SimpleNamespace(request_id=request_id, outputs=[choice])


def server(engine: Engine) -> TestClient:
    """With endpoints that answer whole and streamed, as vLLM's do."""
    app, plugin = FastAPI(), ControlEndpoints()

    @app.post("/v1/completions")
    async def whole() -> JSONResponse:
        return JSONResponse({"choices": [1 async for _ in engine.generate("r")]})

    @app.post("/v1/streamed")
    async def streamed() -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            async for _ in engine.generate("r"):
                yield 'data: {"id": "cmpl-1", "model": "m", "choices": [{"text": "x"}]}\n\n'
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    plugin.attach_router(app)
    asyncio.run(plugin.init_state(engine, app.state, None))
    return TestClient(app)


def events(text: str) -> list[Any]:
    return [json.loads(event) for event in text.replace("data: ", "").split("\n\n") if event not in ("", "[DONE]")]


EXACT, LEAST = "X-Hubsync-Version", "X-Hubsync-Min-Version"


@pytest.mark.parametrize("states", [True, False], ids=["the engine states versions", "the engine states none"])
@pytest.mark.parametrize(
    ("headers", "to", "status"),
    [
        ({}, "4", 200),
        ({EXACT: "3"}, None, 200),
        ({LEAST: "2"}, None, 200),
        ({LEAST: "3"}, "4", 200),
        ({LEAST: "3", EXACT: "3"}, None, 200),
        ({EXACT: "3"}, "4", 409),
        ({LEAST: "3"}, "2", 409),
    ],
)
def test_an_answer_has_only_tokens_of_wanted_versions(
    headers: dict[str, str], to: str | None, status: int, states: bool
) -> None:
    engine = Engine("3", to, states=states)
    answer = server(engine).post("/v1/completions", headers=headers)
    assert (answer.status_code, engine.generated) == (status, 1)
    if headers:
        versions = sorted((3, int(to or 3)))
        assert answer.headers["X-Hubsync-Versions"] == f"{versions[0]}-{versions[1]}"
    if status == 200:
        assert answer.json() == {"choices": [1, 1]}


@pytest.mark.parametrize("version", ["3", "default"])
@pytest.mark.parametrize("headers", [{EXACT: "2"}, {EXACT: "4"}, {LEAST: "4"}, {LEAST: "4", EXACT: "3"}])
def test_a_server_that_is_elsewhere_refuses_at_once_and_says_where_it_is(headers: dict[str, str], version: str) -> None:
    engine = Engine(version)
    for path in ("/v1/completions", "/v1/streamed"):
        answer = server(engine).post(path, headers=headers)
        assert answer.status_code == 409
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("VersionConflict", 409)
        assert error["current_version"] == (3 if version == "3" else None)
    assert engine.generated == 0


@pytest.mark.parametrize("value", ["", "-1", "1.0", "x", "9" * 30, "\u0663".encode().decode("latin-1")])
def test_what_is_no_version_is_refused(value: str) -> None:
    engine = Engine("3")
    answer = server(engine).post("/v1/completions", headers={EXACT.encode(): value.encode("latin-1")})
    assert answer.status_code == 400
    assert EXACT in answer.json()["error"]["message"]
    assert engine.generated == 0


def test_a_stream_says_which_versions_made_it_before_it_ends() -> None:
    answer = server(Engine("3", "4")).post("/v1/streamed", headers={LEAST: "3"})
    assert answer.text.endswith("}\n\ndata: [DONE]\n\n")
    *chunks, last = events(answer.text)
    assert [chunk["choices"] for chunk in chunks] == [[{"text": "x"}]] * 2
    spans = [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 4}]
    expected = {"choices": [], "versions": [3, 4], "weight_versions": [{"index": 0, "spans": spans}]}
    assert last == {"id": "cmpl-1", "model": "m", **expected}


@pytest.mark.parametrize("states", [True, False])
def test_a_stream_that_left_the_version_ends_with_an_error(states: bool) -> None:
    answer = server(Engine("3", "4", states=states)).post("/v1/streamed", headers={EXACT: "3"})
    assert answer.status_code == 200, "it had begun"
    *chunks, last = events(answer.text)
    assert len(chunks) == 2
    assert (last["error"]["type"], last["error"]["current_version"]) == ("VersionConflict", 4)
    assert "wants version 3, and this server served versions 3 to 4" in last["error"]["message"]


def test_who_has_no_key_does_not_learn_what_is_served() -> None:
    """vLLM's API key does not guard other paths."""
    assert server(Engine("3")).get("/health", headers={EXACT: "9"}).status_code == 404


def test_a_stream_without_a_demand_is_left_alone() -> None:
    assert len(events(server(Engine("3", "4")).post("/v1/streamed").text)) == 2
