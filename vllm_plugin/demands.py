"""Requests that demand a version: ASGI middleware of the endpoint plugin.

    X-Hubsync-Version: 41        only tokens of version 41
    X-Hubsync-Min-Version: 41    only tokens of version 41 and newer

A server that is elsewhere when the request arrives answers 409 at once. One that commits meanwhile answers 409 when the
answer is complete, if any of its tokens is of a version that was not wanted. A streamed answer has begun by then: it
ends with an error event. Other answers state their oldest and newest version in `X-Hubsync-Versions`; streamed ones
state the versions of their tokens in an event without choices before the last.

Requests without these headers, and to paths that the API key does not guard, pass through. This module imports neither
vLLM nor a web framework.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from hubsync.apply.protocol import MIN_VERSION_HEADER, VERSION_HEADER, VERSIONS_HEADER
from hubsync.errors import FormatError
from hubsync.format.manifest import MAX_VERSION

Versions = tuple[int, int]
"""The oldest and the newest."""

Message = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]

_GUARDED = ("/v1/", "/v2/", "/inference/")  # by vLLM's API key: nobody else learns what is served

_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Demand:
    """What a request wants: exactly one version, or at least one."""

    exact: int | None
    least: int | None

    def allows(self, versions: Versions) -> bool:
        oldest, newest = versions
        return (self.exact is None or oldest == newest == self.exact) and (self.least is None or oldest >= self.least)

    def __str__(self) -> str:
        parts = [f"version {self.exact}"] if self.exact is not None else []
        return " and ".join([*parts, f"version {self.least} or newer"] if self.least is not None else parts)


def demand_of(headers: Iterable[tuple[bytes, bytes]]) -> Demand | None:
    """The demand in a request's headers, None without one. FormatError if one is no version."""
    found: dict[str, int] = {}
    for name, value in headers:
        for wanted in (VERSION_HEADER, MIN_VERSION_HEADER):
            if name.decode("latin-1").lower() == wanted.lower():
                found[wanted] = _version(wanted, value.decode("latin-1").strip())
    return Demand(found.get(VERSION_HEADER), found.get(MIN_VERSION_HEADER)) if found else None


def _version(header: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 20 and int(text) <= MAX_VERSION):
        raise FormatError(f"{header} must be a version from 0 to {MAX_VERSION}, not {text!r:.40}")
    return int(text)


# --- which versions made an answer ---------------------------------------------------------------------


@dataclass
class Seen:
    """Versions of the tokens that the engine made for one request.

    Attributes:
        spans: by choice: which tokens under which version.
    """

    spans: dict[tuple[str, int], list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, output: Any) -> None:
        """Record an output of the engine. vLLM states versions when a choice is complete, and not before 0.28."""
        for choice in getattr(output, "outputs", ()):
            spans = getattr(choice, "weight_versions", None)
            if spans:
                key = str(getattr(output, "request_id", "")), int(getattr(choice, "index", 0))
                self.spans[key] = [_span(span) for span in spans]

    @property
    def versions(self) -> Versions | None:
        """None if nothing is known; (-1, -1) if a token was made by something that is no version of the run."""
        labels = [str(span["version"]) for spans in self.spans.values() for span in spans]
        if not labels:
            return None
        numbers = [int(label) if label.isdecimal() else -1 for label in labels]
        return min(numbers), max(numbers)


def _span(span: Any) -> dict[str, Any]:
    read = span.get if isinstance(span, dict) else lambda name: getattr(span, name, None)
    return {name: read(name) for name in ("version", "start", "end")}


_seen: ContextVar[Seen | None] = ContextVar("hubsync_seen", default=None)


def recording(generate: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    """The engine client's `generate`, which records the versions of requests that demand one."""

    def recorded(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        seen, outputs = _seen.get(), generate(*args, **kwargs)
        return outputs if seen is None else _recorded(outputs, seen)

    return recorded


async def _recorded(outputs: Any, seen: Seen) -> AsyncIterator[Any]:
    try:
        async for output in outputs:
            seen.add(output)
            yield output
    finally:
        await outputs.aclose()


# --- the middleware ------------------------------------------------------------------------------------


class VersionDemands:
    """ASGI middleware.

    Args:
        app: the application.
        current: returns the oldest and the newest version that workers serve now; None if that is none of the run.
    """

    def __init__(self, app: Any, current: Callable[[], Awaitable[Versions | None]]):
        self._app = app
        self._current = current

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        try:
            demand = demand_of(scope["headers"]) if _is_guarded(scope) else None
        except FormatError as error:
            return await _answer(send, 400, {"message": str(error), "type": "FormatError", "code": 400}, None)
        if demand is None:
            return await self._app(scope, receive, send)
        before = await self._current()
        if before is None or not demand.allows(before):
            return await _answer(send, 409, _conflict(demand, before), before)
        checked = _CheckedAnswer(demand, before, self._current, send)
        token = _seen.set(checked.seen)
        try:
            await self._app(scope, receive, checked)
        finally:
            _seen.reset(token)


def _is_guarded(scope: Any) -> bool:
    if scope["type"] != "http":
        return False
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.startswith(_GUARDED)


class _CheckedAnswer:
    """The `send` of a request with a demand."""

    def __init__(self, demand: Demand, before: Versions, current: Callable[[], Awaitable[Versions | None]], send: Send):
        self.seen = Seen()
        self._demand, self._before, self._current, self._send = demand, before, current, send
        self._refused = self._streams = False
        self._last = b""  # the last event of a stream

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            message = await self._start(message)
        elif self._streams and message["type"] == "http.response.body":
            message = await self._stream(message)
        if not self._refused:
            await self._send(message)

    async def _start(self, message: Message) -> Message:
        kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
        if any(kind.startswith(b"text/event-stream") for kind in kinds):
            self._streams = True
            return message
        versions = await self._versions()
        if versions is None or not self._demand.allows(versions):
            await _answer(self._send, 409, _conflict(self._demand, versions), versions)
            self._refused = True
            return message
        return {**message, "headers": [*message["headers"], _header(versions)]}

    async def _stream(self, message: Message) -> Message:
        """Put the last event before the end of the stream."""
        body = message.get("body", b"")
        ends = body.endswith(_DONE)
        if not ends and message.get("more_body", False):
            self._last = body or self._last
            return message
        self._streams = False
        rest = body.removesuffix(_DONE)
        self._last = rest or self._last
        versions = await self._versions()
        if versions is None or not self._demand.allows(versions):
            event: dict[str, Any] = {"error": _conflict(self._demand, versions)}
        else:
            spans = [{"index": index, "spans": spans} for (_, index), spans in sorted(self.seen.spans.items())]
            event = {**_like(self._last), "choices": [], "weight_versions": spans, "versions": versions}
        last = b"data: " + json.dumps(event).encode() + b"\n\n"
        return {**message, "body": rest + last + (_DONE if ends else b"")}

    async def _versions(self) -> Versions | None:
        """Of the answer: as the engine states it, else what was served before and after."""
        if (stated := self.seen.versions) is not None:
            return stated if stated[0] >= 0 else None
        after = await self._current()
        return None if after is None else (min(self._before[0], after[0]), max(self._before[1], after[1]))


def _like(event: bytes) -> dict[str, Any]:
    """Identifiers of a stream's events, so that clients read one more as they read the others."""
    try:
        document = json.loads(event.strip().rpartition(b"data: ")[2])
        return {name: document[name] for name in ("id", "object", "created", "model") if name in document}
    except (ValueError, TypeError):
        return {}


def _conflict(demand: Demand, versions: Versions | None) -> dict[str, Any]:
    if versions is None:
        serves = "no version of the run: it is not attached, or its weights have another label"
    else:
        serves = f"version {versions[1]}" if versions[0] == versions[1] else f"versions {versions[0]} to {versions[1]}"
    message = f"the request wants {demand}, and this server served {serves}"
    current = None if versions is None else versions[1]
    return {"message": message, "type": "VersionConflict", "code": 409, "current_version": current}


def _header(versions: Versions) -> tuple[bytes, bytes]:
    return VERSIONS_HEADER.lower().encode(), f"{versions[0]}-{versions[1]}".encode()


async def _answer(send: Send, status: int, error: dict[str, Any], versions: Versions | None) -> None:
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [] if versions is None else [_header(versions)]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
