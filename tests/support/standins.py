"""Stand-ins for vLLM servers that die as tests want it: real sockets and HTTP, and no model behind them.

They speak what a sampler asks for: `/health`, `/metrics`, `/inference/v1/generate`, and without scale-out
`/v1/completions` and `/collective_rpc` (`hubsync_status`). The one token of an answer is the request's seed.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

METRICS = """
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="0",model_name="m"}} {waiting}
vllm:num_requests_waiting_by_reason{{engine="0",model_name="m",reason="capacity"}} 1000.0
vllm:request_queue_time_seconds_bucket{{engine="0",le="0.3",model_name="m"}} 7.0
vllm:request_queue_time_seconds_count{{engine="0",model_name="m"}} {finished}
vllm:request_queue_time_seconds_sum{{engine="0",model_name="m"}} {queue_s}
vllm:request_prefill_time_seconds_count{{engine="0",model_name="m"}} {finished}
vllm:request_prefill_time_seconds_sum{{engine="0",model_name="m"}} {prefill_s}
"""


class Hangup(Exception):
    """Close the connection; `after` bytes of the answer have been sent."""

    def __init__(self, after: int = 0):
        self.after = after


@dataclass
class StandIn:
    """A replica.

    Attributes:
        fate: called with every request for a sample before it is answered: None, the status of an error, or raises
            Hangup.
        version: what its weights are labelled.
        scale_out: does it tell versions by itself?
        waiting: length of its queue, as it says.
        endpoints: does it refuse what demands another version, as one with hubsync's endpoints does?
        ill: do its health checks fail?
        paths: what it was asked for.
    """

    fate: Callable[[], int | None] = lambda: None
    version: int = 0
    scale_out: bool = True
    waiting: float = 0.0
    endpoints: bool = False
    ill: bool = False
    paths: list[str] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        self._connections: set[socket.socket] = set()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self) -> None:
        """Nothing listens any more, and all connections are cut."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # ended meanwhile
                pass

    def asked(self, path: str, times: int = 1) -> None:
        """Wait until it has been asked for this path so many times from now on."""
        goal = self.paths.count(path) + times
        while self.paths.count(path) < goal:
            time.sleep(0.002)

    @property
    def samples_asked(self) -> int:
        return self.paths.count("/inference/v1/generate")

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, str | dict[str, Any]]:
        if path == "/health":
            return 503 if self.ill else 200, ""
        if path == "/metrics":
            return 200, METRICS.format(waiting=self.waiting, finished=0, queue_s=0, prefill_s=0)
        if path == "/collective_rpc":
            return 200, {"results": [{"version": self.version, "error": None}]}
        if path == "/tokenize":
            return 200, {"tokens": list(body["prompt"].encode())}
        if path == "/inference/v1/generate" and self.scale_out:
            return self._sample(body["sampling_params"], prompt=body["token_ids"])
        if path == "/v1/completions" and not self.scale_out:
            return self._sample(body, prompt=body["prompt"])
        return 403 if path == "/inference/v1/generate" else 404, {"error": "as vLLM answers"}

    def _conflict(self, headers: Message) -> bool:
        exact, least = headers.get("X-Hubsync-Version"), headers.get("X-Hubsync-Min-Version")
        return (exact is not None and int(exact) != self.version) or (least is not None and int(least) > self.version)

    def _sample(self, options: dict[str, Any], prompt: Any) -> tuple[int, dict[str, Any]]:
        status = self.fate()
        if status is not None:
            return status, {"error": {"message": "as the test wants it"}}
        choice = {"index": 0, "finish_reason": "length", "token_ids": [options["seed"]], "text": f"after {prompt}"}
        if self.scale_out:
            choice["weight_versions"] = [{"version": str(self.version), "start": 0, "end": 1}]
        if "logprobs" in options:
            choice["logprobs"] = {"content": [{"token_id": 1, "logprob": -0.5}]}
        return 200, {"choices": [choice]}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        standin = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # connections are kept, and cut

            def setup(self) -> None:
                super().setup()
                standin._connections.add(self.connection)

            def finish(self) -> None:
                standin._connections.discard(self.connection)
                super().finish()

            def do_GET(self) -> None:
                standin.paths.append(self.path)
                request = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                content: str | dict[str, Any]
                cut = None
                try:
                    if standin.endpoints and standin._conflict(self.headers):
                        status, content = 409, {"error": {"message": f"this server served version {standin.version}"}}
                    else:
                        status, content = standin._answer(self.path, json.loads(request or b"{}"))
                except Hangup as hangup:
                    status, content, cut = 200, {"choices": ["x" * 100]}, hangup.after
                body = (content if isinstance(content, str) else json.dumps(content)).encode()
                head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                try:
                    self.wfile.write((head + body)[:cut])
                except OSError:  # the client has gone
                    cut = 0
                self.close_connection = cut is not None

            do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
