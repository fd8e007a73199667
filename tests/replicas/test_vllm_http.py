"""The vLLM client's errors for unsuitable and failing servers, over real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hubsync.errors import ConfigError, HubsyncError, ReplicaRefused, ReplicaUnreachable, ReplicaUnsuitable
from hubsync.replicas.vllm_http import VLLMServer

CHOICE = {"token_ids": [7], "weight_versions": [{"version": "3", "start": 0, "end": 1}]}

Answers = dict[str, tuple[int, Any]]  # path -> status, JSON document or text


@pytest.fixture
def serve() -> Iterator[Callable[[Answers], VLLMServer]]:
    """Start a server that gives these answers, and 404 for everything else."""
    running: list[ThreadingHTTPServer] = []

    def start(answers: Answers) -> VLLMServer:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, content = answers.get(self.path.partition("?")[0], (404, {"detail": "Not Found"}))
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        running.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, args=(0.02,), daemon=True).start()
        return VLLMServer(f"http://127.0.0.1:{running[-1].server_port}/")

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("version", ["0.8.5", "0.25.4"])
def test_the_error_for_an_old_server_says_to_upgrade_it(serve: Callable[[Answers], VLLMServer], version: str) -> None:
    with pytest.raises(ReplicaUnsuitable, match=rf"runs vLLM {version}; hubsync needs vLLM >= 0.26: upgrade"):
        serve({"/version": (200, {"version": version})}).version()


@pytest.mark.parametrize("version", ["0.27.0", "0.32.0+cpu", "1.0.0", "0.1.dev12345+gabc"])
def test_newer_and_untagged_servers_are_accepted(serve: Callable[[Answers], VLLMServer], version: str) -> None:
    assert serve({"/version": (200, {"version": version})}).version() == version


@pytest.mark.parametrize(
    ("answers", "error", "says"),
    [
        ({}, ReplicaUnsuitable, "VLLM_SERVER_DEV_MODE=1"),
        ({"/collective_rpc": (401, {"error": "Unauthorized"})}, ReplicaUnsuitable, "an API key, and none was given"),
        ({"/collective_rpc": (502, "bad gateway")}, ReplicaUnreachable, "is the vLLM server up"),
        ({"/collective_rpc": (200, "<html>")}, ReplicaUnsuitable, "does not answer like a vLLM server"),
        ({"/collective_rpc": (200, [])}, ReplicaUnsuitable, "does not answer like a vLLM server"),
        ({"/collective_rpc": (200, {"results": []})}, ReplicaUnsuitable, "--worker-extension-cls"),
        ({"/collective_rpc": (200, {"results": [None]})}, ReplicaUnsuitable, "--worker-extension-cls"),
        (
            {"/collective_rpc": (500, {"error": {"message": "'Worker' object has no attribute 'hubsync_undo'"}})},
            ReplicaUnsuitable,
            "--worker-extension-cls",
        ),
        (
            {"/collective_rpc": (500, {"error": {"message": "Method 'hubsync_undo' is not implemented."}})},
            ReplicaUnsuitable,
            "--worker-extension-cls",
        ),
        ({"/collective_rpc": (500, {"error": {"message": "hubsync_undo: not now"}})}, ReplicaRefused, "not now"),
        (
            {"/collective_rpc": (200, {"results": [{}, {"error": {"type": "SystemExit", "message": "stop"}}]})},
            ReplicaRefused,
            "rank 1 refused hubsync_undo: stop",
        ),
    ],
)
def test_every_failure_of_a_request_says_what_to_do(
    serve: Callable[[Answers], VLLMServer], answers: Answers, error: type[HubsyncError], says: str
) -> None:
    with pytest.raises(error, match=says):
        serve(answers).rpc("hubsync_undo")


STATUS: dict[str, Any] = {"results": [{"rank": 0, "error": None}]}


def test_the_own_endpoints_are_used_where_they_answer_and_the_development_endpoints_where_not(
    serve: Callable[[Answers], VLLMServer],
) -> None:
    answers: Answers = {"/collective_rpc": (200, {"results": [{"rank": "development"}]})}
    server = serve(answers)
    assert server.rpc("hubsync_status") == [{"rank": "development"}]
    answers["/v1/hubsync/status"] = (200, STATUS)
    assert server.rpc("hubsync_status") == [{"rank": "development"}], "no request more for each call"
    del answers["/collective_rpc"]  # restarted without development mode
    assert server.rpc("hubsync_status") == STATUS["results"]
    answers |= {"/collective_rpc": (500, "unused"), "/pause": (500, "unused"), "/v1/hubsync/pause": (200, {})}
    assert server.rpc("hubsync_status") == STATUS["results"]
    server.pause()
    del answers["/v1/hubsync/pause"]
    with pytest.raises(ReplicaRefused, match="/pause answered 500: unused"):
        server.pause()


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_reported_unless_the_development_endpoints_are_open(
    serve: Callable[[Answers], VLLMServer], status: int
) -> None:
    answers: Answers = {"/v1/hubsync/status": (status, {"error": "Unauthorized"})}
    server = serve(answers)
    with pytest.raises(ReplicaUnsuitable, match="wants an API key, and none was given"):
        server.rpc("hubsync_status")
    answers["/collective_rpc"] = (200, STATUS)
    assert server.rpc("hubsync_status") == STATUS["results"]


def test_the_logprobs_mode_is_known_without_development_endpoints(serve: Callable[[Answers], VLLMServer]) -> None:
    answers: Answers = {}
    server = serve(answers)
    assert server.logprobs_mode() is None
    answers["/server_info"] = (200, {"vllm_config": {"model_config": {"logprobs_mode": "raw_logprobs"}}})
    assert server.logprobs_mode() == "raw_logprobs"
    answers["/v1/hubsync"] = (200, {"protocol": 1})  # of an older hubsync
    assert server.logprobs_mode() == "raw_logprobs"
    answers["/v1/hubsync"] = (200, {"protocol": 1, "logprobs_mode": "processed_logprobs"})
    assert server.logprobs_mode() == "processed_logprobs"


def test_a_server_with_neither_endpoints_is_told_both_remedies(serve: Callable[[Answers], VLLMServer]) -> None:
    for call in (lambda server: server.rpc("hubsync_status"), VLLMServer.pause, VLLMServer.world_size):
        with pytest.raises(ReplicaUnsuitable, match=r"VLLM_PLUGINS=hubsync .*VLLM_SERVER_DEV_MODE=1"):
            call(serve({}))


@pytest.mark.parametrize(
    "url", ["", "localhost", "localhost:8000", "ftp://x", "http://", "http://[::1", "http://x:port", "http://x\n"]
)
def test_an_invalid_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match="is not the URL of a server"):
        VLLMServer(url)


@pytest.mark.parametrize(
    ("status", "content", "says"),
    [
        (404, {}, "start it with --enable-scale-out"),
        (403, {"error": "as newer versions answer"}, "start it with --enable-scale-out"),
        (200, {"choices": [{"token_ids": [7]}]}, "needs vLLM >= 0.32"),
        (200, "nonsense", "needs vLLM >= 0.32"),
        (500, {"error": {"message": "no such model"}}, "no such model"),
    ],
)
def test_a_server_that_states_no_versions_of_tokens_is_refused(
    serve: Callable[[Answers], VLLMServer], status: int, content: Any, says: str
) -> None:
    with pytest.raises(ReplicaUnsuitable, match=f"reports no weight versions of samples.*{says}"):
        serve({"/inference/v1/generate": (status, content)}).require_stated_versions(None)
    serve({"/inference/v1/generate": (200, {"choices": [CHOICE]})}).require_stated_versions("policy")


def test_a_server_that_is_away_when_it_is_asked_for_versions_is_unreachable() -> None:
    with pytest.raises(ReplicaUnreachable, match="is the vLLM server up"):
        VLLMServer("http://127.0.0.1:9").require_stated_versions(None)


def test_an_address_without_a_vllm_server_is_named_with_what_may_be_wrong(
    serve: Callable[[Answers], VLLMServer],
) -> None:
    with pytest.raises(ReplicaUnsuitable, match=r"no vLLM server answers at .*path of a proxy.*VLLM_API_KEY"):
        serve({}).version()


def test_a_redirect_that_leads_to_an_error_names_its_target(serve: Callable[[Answers], VLLMServer]) -> None:
    class Redirecting(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(302)
            self.send_header("Location", f"{elsewhere.url}{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    elsewhere = serve({"/pause": (405, "Method Not Allowed")})
    with ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) as listener:
        threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        server = VLLMServer(f"http://127.0.0.1:{listener.server_port}")
        with pytest.raises(ReplicaUnsuitable, match=f"redirects to {elsewhere.url}/pause.*: give the address"):
            server.pause()
        listener.shutdown()
