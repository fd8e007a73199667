"""Inference engine without weights for `null://NAME`: it stages and commits whatever it is asked to."""

from __future__ import annotations

from typing import Any, ClassVar

from hubsync.apply.protocol import PROTOCOL
from hubsync.format.manifest import Position


class NullServer:
    """Client and server in one; all clients of a URL in this process share the server's state."""

    served: ClassVar[dict[str, Position]] = {}
    staged: ClassVar[dict[str, Position]] = {}

    def __init__(self, url: str, api_key: str | None = None, *, timeout: float = 120.0):
        self.url = url
        self.served.setdefault(url, Position(0, "0" * 64))

    def version(self) -> str:
        return "1.0"

    def world_size(self) -> int:
        return 1

    def rpc(self, method: str, *args: Any) -> list[dict[str, Any]]:
        if method == "hubsync_stage":
            self.staged[self.url] = Position(*args)
        elif method == "hubsync_commit":
            self.served[self.url] = self.staged.pop(self.url)
        return [self._status()]

    def _status(self) -> dict[str, Any]:
        served, staged = self.served[self.url], self.staged.get(self.url)
        return {
            "protocol": PROTOCOL,
            "state": "staged" if staged else "ready",
            "version": served.version,
            "digest": served.digest,
            "staged": {"version": staged.version, "digest": staged.digest} if staged else None,
            "engine": {"atomic": True, "turn_s": 0.0, "window_timeout_s": 15.0},
        }

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def generate_a_token(self) -> None:
        pass

    def load_adapter(self, name: str, path: str) -> None:
        pass

    def close(self) -> None:
        pass
