"""A server without vLLM: plain modules with weights, served by the parts of hubsync that run in a vLLM server.

The workers' sessions, the engine core's part (`hubsync.apply.engine_commit`, watchdog included) and HTTP are real, so
real clients and followers talk to it. A forward pass only checks that it may run, and on which weights.
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

from hubsync.apply.engine import Answers
from hubsync.apply.engine_commit import EngineCommit
from hubsync.apply.protocol import WorkerMethod
from hubsync.apply.session import Session
from hubsync.apply.worker_methods import WorkerMethods, status
from hubsync.errors import ReplicaPoisoned

WINDOW_TIMEOUT_S = 1.0  # how long a killed client may leave a window open

_TURN_S = 0.02  # between two forward passes while no request comes
_VLLM = "0.32.0"

T = TypeVar("T")


class _Worker(WorkerMethods):
    """One rank: its session, and the thread that runs forward passes and answers requests."""

    def __init__(self, rank: int, session: Session):
        self.rank = rank
        self.session = session
        self.thread = ThreadPoolExecutor(1)

    def _hubsync_session(self) -> Session:
        return self.session

    def _hubsync_about(self) -> dict[str, Any]:
        return {"rank": self.rank, "parallel": {"dp": 1}, "vllm": _VLLM}


class Engine:
    """The loop of an engine core: a request, a forward pass, and again. Implements `hubsync.apply.engine.EngineCore`.

    Attributes:
        mixed: violation seen by a forward pass: ranks at different versions, or a label of another version.
    """

    index = 0
    asleep = False

    def __init__(self, sessions: Sequence[Session], *, alone: bool):
        self.alone = alone
        self.paused = False
        self.label = "default"
        self.mixed: str | None = None
        self._workers = [_Worker(rank, session) for rank, session in enumerate(sessions)]
        self._turns: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._core = EngineCommit(self, WINDOW_TIMEOUT_S)

    @property
    def size(self) -> int:
        return len(self._workers)

    def run(self) -> None:
        """Loop until the process ends."""
        while True:
            try:
                self._turns.get(timeout=_TURN_S)()
            except queue.Empty:
                pass
            if not self.paused:
                self._forward()

    def between(self, act: Callable[[], T]) -> T:
        """Call `act` between two forward passes, and return its result. Call this from any other thread."""
        future: Future[T] = Future()

        def turn() -> None:
            try:
                future.set_result(act())
            except Exception as error:
                future.set_exception(error)

        self._turns.put(turn)
        return future.result()

    def request(self, method: str, *args: Any) -> Answers:
        if method == WorkerMethod.WAIT:
            answers = self.between(lambda: self._core.wait(*args))
            return answers.result() if isinstance(answers, Future) else answers
        return self.between(lambda: self._core.handle(method, *args))

    def _forward(self) -> None:
        """Rebuild poisoned weights, or do not run. Otherwise check that all ranks are at the labelled version."""
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

    # --- `engine_commit.Engine`

    @property
    def still(self) -> bool:
        return self.paused  # requests are handled between forward passes

    def settle(self) -> None: ...

    def recompute(self) -> None: ...

    def isolate(self) -> None: ...

    def call(self, method: str, *args: Any, **kwargs: Any) -> Answers:
        asked = [worker.thread.submit(getattr(worker, method), *args, **kwargs) for worker in self._workers]
        return [future.result() for future in asked]

    def statuses(self) -> Answers:
        return [{**status(worker.session, worker._hubsync_about()), "error": None} for worker in self._workers]

    def set_label(self, version: str) -> None:
        self.label = version

    def resume(self) -> None:
        self.paused = False

    def until(self, reached: Callable[[], bool]) -> Future[None]:
        future: Future[None] = Future()

        def look() -> None:
            if reached():
                future.set_result(None)
            else:
                self.later(_TURN_S, look)

        look()
        return future

    def later(self, seconds: float, turn: Callable[[], None]) -> Callable[[], None]:
        timer = threading.Timer(seconds, self._turns.put, [turn])
        timer.daemon = True
        timer.start()
        return timer.cancel


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
        case "/version":
            return {"version": _VLLM}
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
