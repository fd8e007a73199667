"""HTTP for a local Hub: routes, bearer tokens, request counters and injected faults. Knows nothing of buckets."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .limits import RateLimit
from .xet import MAX_XORB_BYTES, MalformedError

_STEPS = 20  # a second, of bodies that are slowed down

_PLACEHOLDERS = {"path": "(.+)", "hash": "([0-9a-f]{64})"}


@dataclass(frozen=True)
class Request:
    """One request, body included. `query` holds the last value of each parameter."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Message
    body: bytes

    @property
    def bearer(self) -> str | None:
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        return token if scheme.lower() == "bearer" and token else None

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; HttpError 400 otherwise."""
        try:
            doc = json.loads(self.body or b"{}")
        except ValueError:
            doc = None
        if not isinstance(doc, dict):
            raise HttpError(400, "expected a JSON object")
        return doc


@dataclass(frozen=True)
class Reply:
    """An answer. A `body` of bytes is sent unchanged, an iterator of bytes as they come, any other as JSON."""

    body: Any = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    type: str = "application/json"


class HttpError(Exception):
    """Ends a request with this status. huggingface_hub chooses its exception by `code`."""

    def __init__(self, status: int, message: str, code: str | None = None, body: Any = None, **headers: str) -> None:
        super().__init__(message)
        known = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.reply = Reply({"error": message} if body is None else body, status, {**known, **headers})


@dataclass(frozen=True)
class Route:
    """`template` is a path with `{placeholders}`; `answer` gets the request and their decoded values."""

    method: str
    template: str
    answer: Callable[..., Reply]

    @property
    def name(self) -> str:
        return f"{self.method} {self.template}"

    @property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.sub(r"\{(\w+)\}", lambda m: _PLACEHOLDERS.get(m[1], "([^/]+)"), self.template))


@dataclass
class Fault:
    """A fault for the next `times` requests whose "METHOD /path" matches.

    Attributes:
        match: of "METHOD /path".
        times: requests still to be broken.
        status, headers: answer with this error instead.
        delay: seconds to wait first.
        drop: end the connection without doing or answering anything.
        lose_answer: do what is asked, then end the connection without an answer.
        corrupt: flip one bit in the middle of the answer's body.
        truncate: end the connection in the middle of the answer's body.
        silent: accept the request, and say nothing until the Hub is reset or stopped.
        pace: bytes per second at which bodies are read and sent; 0 for full speed.
    """

    match: re.Pattern[str]
    times: int = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drop: bool = False
    lose_answer: bool = False
    corrupt: bool = False
    truncate: bool = False
    silent: bool = False
    pace: float = 0.0


class Server(ThreadingHTTPServer):
    """Serves routes on loopback, one thread per connection."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int) -> None:
        self.routes: list[tuple[Route, re.Pattern[str]]] = []
        self.counts: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.limit: RateLimit | None = None
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._silence = threading.Event()
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, routes: list[Route]) -> None:
        self.routes += [(route, route.pattern) for route in routes]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print no traceback for a client that disconnected."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def disconnect_all(self) -> None:
        """End kept-alive connections: a stopped server must not answer on them."""
        with self._lock:
            for connection in self._connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # already gone

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The first fault that matches, counted down."""
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and fault.match.search(f"{method} {path}"):
                    fault.times -= 1
                    return fault
        return None

    def be_silent(self) -> None:
        """Wait until `break_silence`."""
        with self._lock:
            silence = self._silence
        silence.wait()

    def break_silence(self) -> None:
        with self._lock:
            self._silence.set()
            self._silence = threading.Event()

    def count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: Server
    _pace = 0.0

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        fault = self.server.take_fault(self.command, url.path)
        self._pace = fault.pace if fault else 0.0
        try:
            request = Request(self.command, url.path, query, self.headers, self._read_body())
        except HttpError as error:
            self.close_connection = True  # the rest of that body follows on this connection
            self._send(error.reply)
            return
        if fault and fault.delay:
            time.sleep(fault.delay)
        if fault and fault.silent:
            self.server.be_silent()
        if fault and (fault.drop or fault.silent):
            self.close_connection = True
            return
        reply = self._answer(request, fault)
        if fault and fault.lose_answer:
            self.close_connection = True
            return
        if fault and fault.corrupt and isinstance(reply.body, bytes):
            reply = _with_a_flipped_bit(reply)
        self._send(reply, truncate=bool(fault and fault.truncate))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # names are http.server's

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: requests are counted, not logged."""

    def _answer(self, request: Request, fault: Fault | None) -> Reply:
        for route, pattern in self.server.routes:
            if route.method == request.method and (match := pattern.fullmatch(request.path)):
                self.server.count(route.name)
                allowed, headers = self._limited(request)
                if not allowed:
                    return HttpError(429, "Too many requests", **headers).reply
                if fault and fault.status:
                    return HttpError(fault.status, "injected", **fault.headers).reply
                try:
                    reply = route.answer(request, *(unquote(group) for group in match.groups()))
                    return replace(reply, headers={**headers, **reply.headers})
                except HttpError as error:
                    return error.reply
                except MalformedError as error:
                    return HttpError(400, str(error)).reply
                except Exception as error:  # a handler thread must always answer
                    traceback.print_exc()
                    return HttpError(500, repr(error)).reply
        self.server.count(f"{request.method} (no route)")
        return HttpError(404, f"a local Hub has no {request.method} {request.path}").reply

    def _limited(self, request: Request) -> tuple[bool, Mapping[str, str]]:
        """Whether the request limit allows a request, and headers of its answer."""
        if self.server.limit is None or not request.path.startswith("/api/"):
            return True, {}
        return self.server.limit.take()

    def _read_body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or "").lower():
            return self._read_chunked()
        return self._read_exactly(self.headers.get("Content-Length") or "0", base=10, room=MAX_XORB_BYTES)

    def _read_chunked(self) -> bytes:
        body = b""
        while part := self._read_exactly(
            self.rfile.readline(64).split(b";")[0].decode(), 16, MAX_XORB_BYTES - len(body)
        ):
            body += part
            self.rfile.readline(2)
        self.rfile.readline(2)
        return body

    def _read_exactly(self, length: str, base: int, room: int) -> bytes:
        try:
            size = int(length, base)
        except ValueError:
            raise HttpError(400, "malformed length") from None
        if not 0 <= size <= room:
            raise HttpError(413, "request body too large")
        if not self._pace:
            return self.rfile.read(size)
        return b"".join(self.rfile.read(length) for length in self._steps(size))

    def _steps(self, size: int) -> Iterator[int]:
        """Lengths that add up to `size`, each after the pause that the pace wants."""
        step = max(1, int(self._pace / _STEPS))
        for start in range(0, size, step):
            time.sleep(1 / _STEPS)
            yield min(step, size - start)

    def _stream(self, reply: Reply, blocks: Iterator[bytes]) -> None:
        """Send blocks as they come, and end the connection after the last one."""
        self.close_connection = True
        self.send_response(reply.status)
        for key, value in {"Content-Type": reply.type, "Connection": "close", **reply.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        for block in blocks:
            self.wfile.write(block)
            self.wfile.flush()

    def _send(self, reply: Reply, *, truncate: bool = False) -> None:
        if isinstance(reply.body, Iterator):
            self._stream(reply, reply.body)
            return
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for key, value in {"Content-Type": reply.type, "Content-Length": str(len(body)), **reply.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if truncate:
            self.close_connection = True
            body = body[: len(body) // 2]
        if self.command == "HEAD":
            return
        if not self._pace:
            self.wfile.write(body)
            return
        sent = 0
        for length in self._steps(len(body)):
            self.wfile.write(body[sent : sent + length])
            self.wfile.flush()
            sent += length


def _with_a_flipped_bit(reply: Reply) -> Reply:
    body = bytearray(reply.body)
    body[len(body) // 2] ^= 1
    return Reply(bytes(body), reply.status, reply.headers, reply.type)
