"""Token streams of a server, and when each token arrived: a process of its own, which waits for nothing else.

    python -m benchmarks.gpu.streams HOST PORT MODEL STREAMS TOKENS FILE

Prints `ready` once every stream has received 50 tokens, reads standard input until it ends, and writes FILE: a NumPy
archive of `stream`, `request` and `time` (`time.perf_counter`, which all processes of a Linux machine share) of each
token.
"""

from __future__ import annotations

import json
import selectors
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import httpx
import numpy as np

PROMPT = 16  # tokens


class _Stream:
    """One connection, which sends streamed requests one after the other."""

    def __init__(self, host: str, port: int, model: str, tokens: int, number: int):
        self.times: list[float] = []
        self.requests: list[int] = []
        self._request, self._rest = 0, b""
        self._body = {"model": model, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        self._number = number
        self.socket = socket.create_connection((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._send()

    def _send(self) -> None:
        self._request += 1
        prompt = [(1000 * self._number + 31 * self._request + 7 * i) % 900 + 3 for i in range(PROMPT)]
        body = json.dumps({**self._body, "prompt": prompt}).encode()
        head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
        head += [f"Content-Length: {len(body)}", "", ""]
        self.socket.sendall("\r\n".join(head).encode() + body)

    def read(self) -> None:
        data, now = self.socket.recv(1 << 16), time.perf_counter()
        if not data:
            raise ConnectionError("the server has closed a stream")
        data = self._rest + data
        lines = data.split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data: {"):
                self.times.append(now)
                self.requests.append(self._request)
            elif line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                raise ConnectionError(data.decode(errors="replace")[:500])
            elif line.startswith(b"data: [DONE]"):
                self._rest = b""
                self._send()
                return


def run(host: str, port: int, model: str, streams: int, tokens: int, file: Path) -> None:
    selector = selectors.DefaultSelector()
    all_streams = [_Stream(host, port, model, tokens, number) for number in range(streams)]
    for stream in all_streams:
        selector.register(stream.socket, selectors.EVENT_READ, stream)
    selector.register(sys.stdin, selectors.EVENT_READ, None)
    is_ready = False
    while True:
        for key, _ in selector.select():
            if key.data is None:
                _write(file, all_streams)
                return
            key.data.read()
        if not is_ready and all(len(stream.times) > 50 for stream in all_streams):
            is_ready = True
            print("ready", flush=True)


def _write(file: Path, streams: list[_Stream]) -> None:
    number = np.repeat(np.arange(len(streams)), [len(stream.times) for stream in streams])
    request = np.concatenate([np.array(stream.requests, np.int64) for stream in streams])
    moment = np.concatenate([np.array(stream.times) for stream in streams])
    np.savez(file, stream=number, request=request, time=moment)


class Streams:
    """Such a process, of a server. Ended by `finish`, or when this object's context ends."""

    def __init__(self, url: str, model: str, streams: int, tokens: int, file: Path):
        at = httpx.URL(url)
        self._file = file
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu.streams",
            at.host,
            str(at.port),
            model,
            str(streams),
            str(tokens),
        ]
        self._process = subprocess.Popen([*command, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Streams:
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != b"ready":
            raise RuntimeError("the token streams have ended early")
        return self

    def finish(self) -> Arrivals:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait(60):
            raise RuntimeError("the token streams have failed")
        return Arrivals(self._file)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class Arrivals:
    """The tokens of all streams. Moments and times in seconds."""

    def __init__(self, file: Path):
        with np.load(file) as found:
            self._stream, self._request, self._time = found["stream"], found["request"], found["time"]
        self.streams = int(self._stream.max()) + 1

    def between(self, start: float, end: float) -> int:
        """Tokens that arrived in an interval."""
        return int(((self._time >= start) & (self._time < end)).sum())

    def in_flight(self, moment: float) -> int:
        """Tokens of running requests, prompts included."""
        total = 0
        for number in range(self.streams):
            before = (self._stream == number) & (self._time < moment)
            if before.any():
                total += PROMPT + int((self._request[before] == self._request[before][-1]).sum())
        return total

    def longest_gaps(self, start: float, end: float) -> np.ndarray:
        """For each stream, the longest time between two tokens of a request that overlaps the interval."""
        gaps = np.zeros(self.streams)
        same = (np.diff(self._stream) == 0) & (np.diff(self._request) == 0)
        overlaps = same & (self._time[1:] > start) & (self._time[:-1] < end)
        np.maximum.at(gaps, self._stream[1:][overlaps], np.diff(self._time)[overlaps])
        return gaps


if __name__ == "__main__":
    host, port, model, streams, tokens, file = sys.argv[1:]
    run(host, int(port), model, int(streams), int(tokens), Path(file))
