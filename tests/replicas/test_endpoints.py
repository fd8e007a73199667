"""hubsync's control endpoints in a FastAPI application, around an engine client that is a stand-in.

`tests/servers/test_end_to_end.py` has them in a real vLLM server, behind its API key.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomllib

from hubsync.apply.protocol import PARAMETERS, WorkerMethod, control_path
from hubsync.apply.worker_methods import WorkerMethods

pytest.importorskip("fastapi")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_plugin.endpoints import ControlEndpoints


class StandInEngine:
    """What the endpoints use of vLLM's engine client."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.paused = False
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(world_size_across_dp=2),
            model_config=SimpleNamespace(logprobs_mode="processed_logprobs"),
        )

    async def collective_rpc(self, method: str, *, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
        self.calls.append((method, kwargs))
        return [{"rank": 0, "error": None}, {"rank": 1, "error": None}]

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("keep", False), "requests go on afterwards"
        self.paused = True

    async def resume_generation(self) -> None:
        self.paused = False

    async def is_paused(self) -> bool:
        return self.paused


@pytest.fixture
def engine() -> StandInEngine:
    return StandInEngine()


@pytest.fixture
def http(engine: StandInEngine) -> TestClient:
    plugin, app = ControlEndpoints(), FastAPI()
    plugin.attach_router(app)
    plugin._engine = engine  # `init_state` of a server
    return TestClient(app)


def test_every_worker_method_has_its_path_and_its_named_arguments(http: TestClient, engine: StandInEngine) -> None:
    for method, names in PARAMETERS.items():
        arguments = dict.fromkeys(names, "x")
        answer = http.post(control_path(method), json=arguments)
        assert answer.json() == {"results": [{"rank": 0, "error": None}, {"rank": 1, "error": None}]}
        assert engine.calls[-1] == (method, arguments)
    assert http.get("/v1/hubsync/status").status_code == 200
    assert http.get("/v1/hubsync/commit").status_code == 405, "reading changes nothing"


def test_the_table_of_parameters_is_that_of_the_worker_methods() -> None:
    named = {name for attribute, name in vars(WorkerMethod).items() if attribute.isupper()}
    assert named == PARAMETERS.keys()
    for method, names in PARAMETERS.items():
        if method in (WorkerMethod.HOLD, WorkerMethod.WAIT):  # answered by the engine core
            continue
        function = getattr(WorkerMethods, method).__wrapped__
        assert function.__code__.co_varnames[1 : function.__code__.co_argcount] == names


@pytest.mark.parametrize(
    "body", [b"[]", b"{", b'{"bucket": "/elsewhere"}', b'"x"', b'{"version": 1, "x": 2}', b" " * 70000]
)
def test_what_is_no_argument_of_the_method_never_reaches_the_engine(
    http: TestClient, engine: StandInEngine, body: bytes
) -> None:
    answer = http.post("/v1/hubsync/stage", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "FormatError"
    assert not engine.calls


def test_a_server_is_paused_and_resumed(http: TestClient) -> None:
    assert http.post("/v1/hubsync/pause").json() == {"status": "paused"}
    assert http.get("/v1/hubsync/is_paused").json() == {"is_paused": True}
    assert http.post("/v1/hubsync/resume").json() == {"status": "resumed"}
    assert http.get("/v1/hubsync/is_paused").json() == {"is_paused": False}


def test_the_endpoints_say_what_they_speak(http: TestClient) -> None:
    about = http.get("/v1/hubsync").json()
    assert about["protocol"] == 1
    assert about["logprobs_mode"] == "processed_logprobs"
    assert about["world_size"] == http.get("/v1/hubsync/get_world_size").json()["world_size"] == 2
    assert http.get("/v1/hubsync/weight_info").json() == {"weight_version": None}, "vLLM 0.26 states none"


def test_vllm_finds_both_plugins_by_the_name_in_the_documented_line() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]
    assert points["vllm.endpoint_plugins"] == {ControlEndpoints.name: "vllm_plugin.endpoints:ControlEndpoints"}
    assert points["vllm.general_plugins"].keys() == {ControlEndpoints.name}
