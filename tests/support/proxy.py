"""A reverse proxy that demands a token, as gateways, private Spaces and ports of HF Jobs do. Real HTTP, no TLS."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

import httpx

TOKEN = "proxy-token-9d1f"
PREFIX = "/llm/a"


class TokenProxy:
    """Passes requests below `PREFIX` on to `target` if they carry the right `Authorization` header.

    Attributes:
        url: base URL of the target behind the proxy, with the prefix.
        refused: number of requests without the right header.
        passed: paths that were passed on, without the prefix.
    """

    def __init__(self, target: str, authorization: str = f"Bearer {TOKEN}"):
        self.refused = 0
        self.passed: list[str] = []
        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, target, authorization))
        self._listener.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._listener.server_port}{PREFIX}"
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> TokenProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown()
        self._listener.server_close()


def _handler(proxy: TokenProxy, target: str, authorization: str) -> type[BaseHTTPRequestHandler]:
    upstream = httpx.Client(trust_env=False, timeout=600.0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != authorization:
                proxy.refused += 1
                return self._send(401, b'{"error": "no, or a wrong token"}')
            if not self.path.startswith(f"{PREFIX}/"):
                return self._send(404, b"{}")
            path = self.path.removeprefix(PREFIX)
            proxy.passed.append(path)
            kind = {"Content-Type": self.headers["Content-Type"]} if "Content-Type" in self.headers else {}
            # A connection per request: the target may close a kept one under a request.
            headers = {"Connection": "close", **kind}
            try:
                answer = upstream.request(self.command, target + path, content=body, headers=headers)
            except httpx.HTTPError:
                return self._send(502, b"{}")
            return self._send(answer.status_code, answer.content)

        do_POST = do_GET

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
