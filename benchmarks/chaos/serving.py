"""A server without vLLM: plain modules that hold weights, and around them the parts that run in a vLLM server.

The workers' sessions, the engine core's part (`hubsync.apply.engine_commit`, watchdog included) and HTTP are real, so
real clients and followers talk to it. vLLM is missing: a forward pass only checks whether it may run, and on which
weights.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import urlsplit

import hubsync
from hubsync.apply.engine_commit import Answers, Core
from hubsync.apply.protocol import answering
from hubsync.apply.session import Session
from hubsync.errors import ReplicaPoisoned, ReplicaUnsuitable
from vllm_plugin.worker import PROTOCOL, position_of

WINDOW_TIMEOUT_S = 1.0  # a client that was killed in a window is waited for as long

_TURN_S = 0.02  # between two forward passes, where no request comes
_SETTINGS = {"parallel": {"dp": 1}, "vllm": "0.32.0", "hubsync": hubsync.__version__}
_METHODS = {f"hubsync_{name}" for name in ("attach", "join", "stage", "open", "commit", "close", "undo", "heal")}
_NAMING = {"hubsync_stage", "hubsync_open", "hubsync_commit"}  # a version and a digest

T = TypeVar("T")


class _Worker:
    """One rank: its session, and the thread on which it runs forward passes and answers requests."""

    def __init__(self, rank: int, session: Session):
        self.rank = rank
        self.session = session
        self.thread = ThreadPoolExecutor(1)

    @answering
    def answer(self, method: str, *args: Any) -> dict[str, Any]:
        """As `vllm_plugin.extension`, which cannot be imported without vLLM."""
        if method == "hubsync_status":
            self.session.start()
            return self.status()
        if method not in _METHODS:
            raise ReplicaUnsuitable(f"there is no {method} here")
        if method in _NAMING:
            args = (position_of(*args[:2]), *args[2:])
        result = getattr(self.session, method.removeprefix("hubsync_"))(*args)
        done = {**self.status(), "error": None}
        return done if method != "hubsync_commit" else {**done, "changed": result}

    def status(self) -> dict[str, Any]:
        return {"protocol": PROTOCOL, "rank": self.rank, **_SETTINGS, **self.session.status()}


class Engine:
    """The loop of an engine core: a request, a forward pass, and again. Implements `engine_commit.Engine`.

    Attributes:
        mixed: what a forward pass met that none must: ranks at different versions, or a label of another one.
    """

    index = 0

    def __init__(self, sessions: Sequence[Session], *, alone: bool):
        self.alone = alone
        self.paused = False
        self.label = "default"
        self.mixed: str | None = None
        self._workers = [_Worker(rank, session) for rank, session in enumerate(sessions)]
        self._turns: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._core = Core(self, (WINDOW_TIMEOUT_S, "recompute"))

    @property
    def size(self) -> int:
        return len(self._workers)

    def run(self) -> None:
        """Until the process ends."""
        while True:
            try:
                self._turns.get(timeout=_TURN_S)()
            except queue.Empty:
                pass
            if not self.paused:
                self._forward()

    def between(self, act: Callable[[], T]) -> T:
        """What `act` returns, called between two forward passes. From any other thread."""
        future: Future[T] = Future()

        def turn() -> None:
            try:
                future.set_result(act())
            except Exception as error:
                future.set_exception(error)

        self._turns.put(turn)
        return future.result()

    def request(self, method: str, *args: Any) -> Answers:
        return self.between(lambda: self._core.handle(method, *args))

    def _forward(self) -> None:
        """Poisoned weights are rebuilt, or there is no forward pass; else all ranks must be at what the label says."""
        sessions = [worker.session for worker in self._workers]
        if any(session.state == "poisoned" for session in sessions):
            healing = [worker.thread.submit(worker.session.before_forward) for worker in self._workers]
            for error in [future.exception() for future in healing]:
                if isinstance(error, ReplicaPoisoned):
                    print(error, flush=True)
                    return
                if error is not None:
                    raise error
        if any(session.state not in ("ready", "staging", "staged", "applied") for session in sessions):
            return
        versions = {session.status()["version"] for session in sessions}
        labels = {self.label} - {"default"}
        if len(versions) > 1 or labels - set(map(str, versions)):
            self.mixed = f"a forward pass on versions {versions}, labelled {self.label!r}"

    # --- what hubsync's part of the engine core asks of it

    @property
    def still(self) -> bool:
        return self.paused  # requests are handled between forward passes

    def settle(self) -> None: ...

    def recompute(self) -> None: ...

    def isolate(self) -> None: ...

    def call(self, method: str, *args: Any, **kwargs: Any) -> Answers:
        asked = [worker.thread.submit(worker.answer, method, *args) for worker in self._workers]
        return [future.result() for future in asked]

    def native(self, step: str, *args: Any) -> Answers:
        return [{**worker.status(), "error": None} for worker in self._workers]  # only ever asked for the status

    def set_label(self, version: str) -> None:
        self.label = version

    def resume(self) -> None:
        self.paused = False

    def later(self, seconds: float, turn: Callable[[], None]) -> Callable[[], None]:
        timer = threading.Timer(seconds, self._turns.put, [turn])
        timer.daemon = True
        timer.start()
        return timer.cancel

    def until(self, look: Callable[[], bool]) -> Future[None] | None:
        raise NotImplementedError("there are no weight transfer calls here")


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients are killed at any moment
            super().handle_error(request, client_address)


def listen(engine: Engine, port: int) -> ThreadingHTTPServer:
    """Serve the control endpoints of an engine on 127.0.0.1. OSError if the port is taken."""
    listener = _Listener(("127.0.0.1", port), _handler(engine))
    threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
    return listener


def _answer(engine: Engine, path: str, body: Any) -> Any:
    match path:
        case "/collective_rpc":
            return {"results": engine.request(body["method"], *body["args"])}
        case "/pause" | "/resume":
            engine.between(lambda: setattr(engine, "paused", path == "/pause"))
        case "/update_weight_version":
            engine.between(lambda: engine.set_label(body["new_version"]))
        case "/version":
            return {"version": _SETTINGS["vllm"]}
        case "/get_world_size":
            return {"world_size": engine.size}
        case "/health":
            pass
        case _:
            return None
    return {}


def _handler(engine: Engine) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if len(body) < length:  # the client was killed
                return
            answer = _answer(engine, urlsplit(self.path).path, json.loads(body) if body else None)
            content = json.dumps(answer).encode()
            self.send_response(404 if answer is None else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
