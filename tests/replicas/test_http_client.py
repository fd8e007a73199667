"""HTTP to inference servers: environment proxies, connection reuse, and the error for each failure."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hubsync.errors import ReplicaUnreachable
from hubsync.replicas.http_client import access_to, new_client, trusts_environment
from hubsync.replicas.vllm_http import VLLMServer

HEALTHY = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

Serve = Callable[[Callable[[socket.socket], None]], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`serve(talk)`: the URL of a listener that calls `talk` with each connection, in a thread."""
    listeners: list[socket.socket] = []

    def start(talk: Callable[[socket.socket], None]) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.close()


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("no_proxy", "url", "proxied"),
    [
        ("", "http://10.1.2.3:8000", True),
        ("10.0.0.0/8", "http://10.1.2.3:8000", False),
        ("10.0.0.0/16, 192.168.0.0/16", "http://10.1.2.3:8000", True),
        ("10.0.0.0/16, 10.1.0.0/16", "http://10.1.2.3:8000", False),
        ("fd00::/8", "http://[fd00::1]:8000", False),
        ("10.0.0.0/8", "http://inference:8000", True),
        ("", "http://localhost:8000", False),
        ("", "http://127.0.0.1:8000", False),
    ],
)
def test_a_proxy_is_not_used_to_this_machine_or_an_excluded_network(
    monkeypatch: pytest.MonkeyPatch, no_proxy: str, url: str, proxied: bool
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", no_proxy)
    assert trusts_environment(url) == proxied


@pytest.mark.parametrize(("no_proxy", "through"), [("", True), ("inference.invalid", False), ("invalid", False)])
def test_requests_go_through_the_proxy_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, serve: Serve, no_proxy: str, through: bool
) -> None:
    asked: list[bytes] = []

    def proxy(connection: socket.socket) -> None:
        asked.append(connection.recv(65536).split(b"\r\n")[0])
        connection.sendall(HEALTHY)

    monkeypatch.setenv("http_proxy", serve(proxy))
    monkeypatch.setenv("no_proxy", no_proxy)
    server = VLLMServer("http://inference.invalid:8000", timeout=10.0)
    if through:
        assert server.health()
        assert asked == [b"GET http://inference.invalid:8000/health HTTP/1.1"]
    else:
        with pytest.raises(ReplicaUnreachable, match="cannot connect"):
            server.health()
        assert not asked


def test_a_connection_is_reused_and_replaced_when_the_server_has_closed_it(serve: Serve) -> None:
    connections: list[int] = []
    closed = threading.Event()

    def talk(connection: socket.socket) -> None:
        connections.append(0)
        for _ in range(2):
            connection.recv(65536)
            connections[-1] += 1
            connection.sendall(HEALTHY)
        connection.close()
        closed.set()

    server = VLLMServer(serve(talk))
    assert server.health()
    assert server.health()
    assert closed.wait(10.0)
    assert server.health()
    assert connections == [2, 1]


@pytest.mark.parametrize(
    ("sends", "says"),
    [
        (b"", "cannot connect to .*: is the vLLM server up"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\nhalf", "cannot connect to .*: is the vLLM server up"),
        (None, "/health gave no answer in 0.5 s"),
    ],
)
def test_a_lost_answer_is_reported_and_its_request_not_repeated(serve: Serve, sends: bytes | None, says: str) -> None:
    asked = []
    silent = threading.Event()

    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        asked.append(1)
        if sends is None:
            silent.wait(10.0)
        else:
            connection.sendall(sends)
        connection.close()

    with pytest.raises(ReplicaUnreachable, match=says):
        VLLMServer(serve(talk), timeout=0.5 if sends is None else 10.0).health()
    silent.set()
    assert asked == [1]


def test_a_redirect_is_followed(serve: Serve) -> None:
    def talk(connection: socket.socket) -> None:
        moved = b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /there/health\r\nContent-Length: 0\r\n\r\n"
        while (line := connection.recv(65536).split(b"\r\n")[0]) != b"":
            connection.sendall(HEALTHY if b"/there/health" in line else moved)

    assert VLLMServer(serve(talk)).health()


def test_requests_to_servers_are_not_in_the_log_of_httpx(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    def talk(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(HEALTHY)

    url, other = serve(talk), serve(talk)
    with caplog.at_level(logging.INFO, "httpx"):
        assert VLLMServer(url).health()
        assert not caplog.messages
        with new_client(access_to(url)) as client:
            client.get(other)
        assert len(caplog.messages) == 1


def test_a_missing_certificate_bundle_is_an_error_and_not_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(OSError, match="No such file"):
        VLLMServer("https://inference.invalid")
    VLLMServer("http://inference.invalid")  # needs no certificates
    VLLMServer("https://127.0.0.1:8000")  # this machine: the environment is not used


def test_an_answer_that_trickles_for_ever_is_given_up(serve: Serve) -> None:
    """It never pauses for long, as behind a proxy that keeps connections open."""
    given_up = threading.Event()

    def talk(connection: socket.socket) -> None:
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not given_up.wait(0.02):
                try:
                    connection.sendall(b" ")
                except OSError:
                    given_up.set()

    with pytest.raises(ReplicaUnreachable, match=r"/version did not complete its answer in 0.3 s"):
        VLLMServer(serve(talk), timeout=0.3).version()
    assert given_up.wait(60), "the connection is closed"


def test_an_answer_of_any_size_is_not_read(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubsync.replicas.http_client.MAX_ANSWER", 1000)

    def talk(connection: socket.socket) -> None:
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b" " * 5000)

    with pytest.raises(ReplicaUnreachable, match="the answer has more than 1000 bytes"):
        VLLMServer(serve(talk)).version()
