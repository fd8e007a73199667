"""A Hugging Face Hub with real buckets in one process and one directory, for development and tests.

The unmodified `huggingface_hub` and `hf_xet` clients work against it: point `HF_ENDPOINT` (or `endpoint=`) at it.
It binds loopback only, and is not a storage service: it checks content hashes of small uploads only (see `xet`), and
never deletes content.

    with LocalHub("hub") as hub:
        bucket = open_bucket("hf://buckets/me/demo/run", create=True, endpoint=hub.url)
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from hubsync.errors import ConfigError

from .access import USER, Access
from .cas import CasApi
from .hub import BucketApi, Refusal
from .limits import RateLimit
from .server import Fault, Server
from .store import Store

__all__ = ["LocalHub"]

_POLL_SECONDS = 0.02  # how often the server checks whether to stop


class LocalHub:
    """Serves the directory `root` from a background thread between `start` and `stop` (or inside `with`).

    Args:
        root: directory of all stored data. Opening it again continues where it stopped.
        port: port on 127.0.0.1; 0 takes a free one.
        tokens: accepted tokens, or a mapping from each to its user; without one, all belong to the user `me`. Private
            buckets are visible to their own user only. None accepts every client everywhere.
        read_only_tokens: tokens of `me` that may not write.
        page: entries per page of a listing.
    """

    def __init__(
        self,
        root: str | Path,
        port: int = 0,
        tokens: Collection[str] | Mapping[str, str] | None = None,
        read_only_tokens: Collection[str] = (),
        page: int = 1000,
    ) -> None:
        self._store = Store(Path(root).absolute())
        users = tokens if tokens is None or isinstance(tokens, Mapping) else dict.fromkeys(tokens, USER)
        known = None if users is None else {**dict.fromkeys(read_only_tokens, USER), **users}
        access = Access(self._store.secret, known, frozenset(read_only_tokens))
        self._server = self._bind(port)
        self.url = self._server.url
        self._buckets = BucketApi(self._store, access, self.url, page)
        self._server.add(self._buckets.routes())
        self._server.add(CasApi(self._store, access, self.url).routes())
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="hubsync-localhub", daemon=True
        )

    @staticmethod
    def _bind(port: int) -> Server:
        try:
            return Server(port)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot serve on 127.0.0.1:{port}: {error}; choose another port, or 0 for a free one"
            ) from None

    def start(self) -> LocalHub:
        """Serve until `stop`."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop serving and end all connections."""
        self._server.shutdown()
        self._server.server_close()
        self._server.disconnect_all()
        self._server.break_silence()
        self._buckets.events.end_streams()
        self._thread.join()
        self._store.close()

    def __enter__(self) -> LocalHub:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def requests(self) -> dict[str, int]:
        """Requests so far by route, such as `"POST /api/buckets/{namespace}/{name}/batch"`."""
        return dict(self._server.counts)

    def api_calls(self) -> int:
        """Requests so far that count against the API rate limit of the real Hub (tokens included)."""
        return sum(count for route, count in self._server.counts.items() if "/api/buckets/" in route)

    def add_model(self, repo: str, bucket: str, sha256: Mapping[str, str]) -> None:
        """Have a model repository `repo` with files that lie in a bucket, of which only names and hashes can be read.

        Args:
            sha256: path in the bucket, and in the repository -> SHA-256 (hex) of the file. KeyError if it is not there.
        """
        self._store.add_model(repo, bucket, sha256)

    def fail(self, match: str, **effects: Any) -> None:
        """Break the next requests whose "METHOD /path" contains the regular expression `match`.

        Args:
            effects: attributes of `server.Fault`, for example `times=2, status=503`.
        """
        self._server.faults.append(Fault(re.compile(match), **effects))

    def faults_left(self) -> int:
        """Number of faults still to be injected."""
        return sum(fault.times for fault in self._server.faults)

    def lag(self, seconds: float, match: str = "") -> None:
        """Let readers see writes late: fresh names are invisible for so long, replaced and deleted ones as they were.

        Applies to writes from now on whose path contains the regular expression `match`. 0 ends it for later writes.
        """
        self._buckets.lag.set(seconds, match)

    def end_streams(self) -> None:
        """End all event streams, as a service does that is restarted. Clients open new ones."""
        self._buckets.events.end_streams()

    def limit(self, calls: int, seconds: float = 300.0) -> None:
        """Answer 429 to API calls beyond so many in each window of `seconds`, with the headers of the real Hub."""
        self._server.limit = RateLimit(calls, seconds)

    def refuse(self, match: str, *, silently: bool = False, times: int = 2**31) -> None:
        """Refuse the next batch operations whose path contains the regular expression `match`.

        `silently` reports success.
        """
        self._buckets.refusals.append(Refusal(re.compile(match), silently, times))

    def reset(self) -> None:
        """Forget all faults, delays, refusals and counters. Stored data stays."""
        self._buckets.lag.clear()
        self._server.limit = None
        self._buckets.refusals.clear()
        self._server.faults.clear()
        self._server.counts.clear()
        self.end_streams()
        self._server.break_silence()
