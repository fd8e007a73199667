"""Hosts that reach the Hub and nothing else: processes in their own network namespaces.

Such a namespace has only a loopback interface. A relay listens on the Hub's port inside, and forwards connections
through a Unix socket (a file, so it crosses namespaces) to the Hub outside.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

_NEW_NETWORK = ["unshare", "--net", "--map-root-user"]


def can_isolate() -> bool:
    """Whether this machine lets us create network namespaces."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return subprocess.run([*_NEW_NETWORK, "ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0


class Gate:
    """The only connection out of isolated hosts: to the Hub at `url`."""

    def __init__(self, url: str, path: Path):
        self._hub = (urlsplit(url).hostname, urlsplit(url).port)
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))

    def command(self, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on a new isolated host, from the current directory."""
        return [
            *_NEW_NETWORK,
            sys.executable,
            "-m",
            "tests.support.isolated",
            str(self._path),
            str(self._hub[1]),
            *command,
        ]

    def __enter__(self) -> Gate:
        _relay(self._listener, lambda: socket.create_connection(self._hub))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()


def _relay(listener: socket.socket, connect: Callable[[], socket.socket]) -> None:
    """Forward each connection to `listener` to a connection that `connect` opens, in background threads."""
    listener.listen(128)

    def accept() -> None:
        with suppress(OSError):  # raised when the listener closes
            while True:
                ours = listener.accept()[0]
                theirs = connect()
                for source, sink in ((ours, theirs), (theirs, ours)):
                    threading.Thread(target=_pump, args=(source, sink), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def main(gate: str, port: str, *command: str) -> int:
    """Runs inside the namespace: open the relay, then run the command."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    listener = socket.create_server(("127.0.0.1", int(port)))

    def connect() -> socket.socket:
        outside = socket.socket(socket.AF_UNIX)
        outside.connect(gate)
        return outside

    _relay(listener, connect)
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
