"""A stand-in for a vLLM server where none can be had: the worker protocol as a model, behind real HTTP.

It moves no weights: it knows which version it would have. Tests with a real server are in `test_pull`.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from hubsync.apply.protocol import CONTROL_PATH
from hubsync.errors import HubsyncError
from hubsync.format.manifest import Position
from tests.replicas.test_replica import BASE, ModelServer


class StandIn(ModelServer):
    """One server at `base`, listening between `start` and `stop`; stopped and started again, it has forgotten all.

    Attributes:
        stuck: while not set, every request waits.
        cold: as many requests to generate fail.
        generated: how many did not.
        run_id: of the run that it is pinned to.
        mismatch: while set, why its weights are at no version of the run.
    """

    def __init__(self, base: Position = BASE, *, atomic: bool = True):
        super().__init__(atomic=atomic)
        self.base = base
        self.run_id: str | None = None
        self.mismatch: str | None = None
        self.cold = self.generated = self.attached = 0
        self.stuck = threading.Event()
        self.stuck.set()
        self._port = 0
        self._listener: ThreadingHTTPServer | None = None
        self.start()

    @property
    def position(self) -> Position:
        return self.positions[0][0]

    def start(self) -> None:
        self.positions, self.staged, self.window, self.state = [[self.base]], None, None, "detached"
        self.labels, self.caches = ["default"], [self.base]
        self._listener = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler())
        self._port = self._listener.server_port
        self.url = f"http://127.0.0.1:{self._port}"
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.stuck.set()
        if self._listener is not None:
            self._listener.shutdown()
            self._listener.server_close()
            self._listener = None

    def __enter__(self) -> StandIn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- what the model of the protocol leaves out

    def hubsync_status(self, engine: int) -> list[dict[str, Any]]:
        ranks = super().hubsync_status(engine)
        more: dict[str, Any] = {"metrics": {"stage_bytes": 1000}, "run_id": self.run_id}
        if self.state in ("detached", "refused"):
            more |= {"version": None, "digest": None}
        if self.mismatch is not None:
            more["error"] = {"type": "RunMismatch", "message": self.mismatch}
        return [rank | more for rank in ranks]

    def hubsync_attach(self, engine: int) -> list[dict[str, Any]]:
        if self.mismatch is not None:
            self.state = "refused"
        elif self.state in ("detached", "refused"):
            self.state, self.attached = "ready", self.attached + 1
        return super().hubsync_attach(engine)

    def hubsync_heal(self, engine: int) -> list[dict[str, Any]]:
        self.state = "ready"
        return [{} for _ in self.positions[engine]]

    # --- HTTP

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        self.stuck.wait()
        if path == "/collective_rpc":
            try:
                return 200, {"results": self.rpc(body["method"], *body["args"])}
            except HubsyncError as error:
                return 200, {"results": [{"error": {"type": type(error).__name__, "message": str(error)}}]}
        if path == "/v1/completions":
            if self.cold:
                self.cold -= 1
                return 500, {"error": {"message": "not yet"}}
            self.generated += 1
            return 200, {"choices": [{"text": "x"}]}
        if path in ("/pause", "/resume"):
            getattr(self, path[1:])()
        if path.startswith(CONTROL_PATH):  # as a server without hubsync's endpoint plugin
            return 404, {"detail": "Not Found"}
        constant = {
            "/version": {"version": self.version()},
            "/get_world_size": {"world_size": self.world_size()},
            "/v1/models": {"data": [{"id": "model"}]},
        }
        return 200, constant.get(path, {})

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        model = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, document = model.answer(urlsplit(self.path).path, json.loads(body) if body else None)
                content = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
