"""The HTTP calls of a bucket on the Hub, each with deadlines and repeated while its failure may pass.

The HTTP session is that of huggingface_hub, with its proxies, certificates and hooks. By itself it waits for ever, and
it is shared with the user's own code, so it is left as it is: each request states its own timeouts. A request that is
given up is closed, never left to a thread that could send it again later.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from urllib.parse import quote

from huggingface_hub import constants, get_token
from huggingface_hub.utils import get_hf_hub_version, get_session, parse_ratelimit_headers

from hubsync import __version__
from hubsync.errors import BucketError, BucketUnavailable
from hubsync.retry import Deadline, attempts

from .abandonable import within
from .hub_errors import FOREIGN, HubPlace, by_connection, by_status, refused

SILENCE_SECONDS = 20.0  # longest wait for the next byte of an answer, or for a connection
ANSWER_SECONDS = 60.0  # longest time of one answer, even if it never pauses
PATIENCE_SECONDS = 24.0  # a failed request is not repeated later than this after the call began
_RENEW_SECONDS = 60.0  # a token of the storage is not used when it expires sooner than this
_MAX_ANSWER = 64 << 20  # bytes
_MAX_PAGES = 100_000
_AT_ONCE = 1000  # paths or operations in one call
_PASSING = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Answer:
    """One complete answer of the Hub. `headers` ignores the case of names."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    next_page: str | None = None

    def json(self) -> Any:
        """The body as JSON; None if it is something else (a proxy's page)."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


@dataclass(frozen=True)
class Entry:
    """A file of a bucket: full path, size in bytes, content hash, and when it was written (seconds since 1970)."""

    path: str
    size: int
    hash: str
    modified: float | None


@dataclass(frozen=True)
class Token:
    """Access to the storage of contents: where it is, and a token for it until `expires` (seconds since 1970).

    Attributes:
        refresh_url, refresh_headers: ask this for a new one.
    """

    url: str
    token: str
    expires: int
    refresh_url: str
    refresh_headers: Mapping[str, str]


class HubApi:
    """The calls of one bucket. Thread-safe.

    Every method raises BucketMissing, BucketDenied, BucketUnavailable or BucketError, after passing failures were
    repeated for about `PATIENCE_SECONDS`, or `patience` seconds where a call has this argument.
    """

    def __init__(self, bucket: str, endpoint: str | None, token: str | None):
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.place = HubPlace(bucket, self.endpoint)
        self._token = token
        self._url = f"{self.endpoint}/api/buckets/{bucket}"
        self._tokens: dict[tuple[str, str], Token] = {}  # of the storage, by scope and the Hub's token

    def headers(self) -> dict[str, str]:
        """Headers of a request. The token is looked up each time: the user may log in while a follower runs.

        Looking it up may use the network (an OAuth token that is refreshed). `build_hf_headers` would also ask the
        public Hub for names of coding agents.
        """
        token = self.token_or_false()
        known = {"User-Agent": f"hubsync/{__version__}; hf_hub/{get_hf_hub_version()}"}
        return known if not token else known | {"Authorization": f"Bearer {token}"}

    def token_or_false(self) -> str | Literal[False]:
        """The token, looked up now; False if there is none. huggingface_hub looks for one by itself if given None."""
        token = self._token
        if token is None and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
            token = within(SILENCE_SECONDS, get_token, "read the Hub's token")
        return token or False

    # --- bucket -------------------------------------------------------------------------------------

    def is_private(self, *, patience: float) -> bool:
        """Whether only its owner may read the bucket; that it exists."""
        doc = self._call("open the run", "GET", self._url, patience=patience).json()
        return isinstance(doc, dict) and doc.get("private") is True

    def create(self, *, patience: float) -> None:
        """Create the bucket, private, unless it exists."""
        body = json.dumps({"visibility": "private"}).encode()
        action = "create the bucket"
        answer = self._answer(action, "POST", self._url, body, "application/json", patience=patience)
        if answer.status != 409:
            self._checked(answer, action)

    def clock(self) -> float:
        """Seconds since 1970 by the Hub's clock."""
        date = self._call("read the clock", "GET", self._url).headers.get("Date", "")
        try:
            return parsedate_to_datetime(date).timestamp()
        except ValueError:
            raise BucketError(
                f"cannot read the clock of {self.place.hub}: its answer has the Date {date!r:.100}"
            ) from None

    def token(self, scope: str, action: str) -> Token:
        """A token to "read" or "write" contents. It is asked for again shortly before it expires."""
        headers = self.headers()
        key = scope, headers.get("Authorization", "")
        known = self._tokens.get(key)
        if known is not None and known.expires - _RENEW_SECONDS > time.time():
            return known
        url = f"{self._url}/xet-{scope}-token"
        doc = self._call(action, "GET", url).json()
        try:
            token = Token(str(doc["casUrl"]), str(doc["accessToken"]), int(doc["exp"]), url, headers)
        except (KeyError, TypeError, ValueError):
            raise self.place.not_a_hub(action) from None
        self._tokens[key] = token
        return token

    def forget_tokens(self) -> None:
        """Ask for a new token next time: a transfer failed, and the token may be the reason."""
        self._tokens.clear()

    # --- names --------------------------------------------------------------------------------------

    def look_up(self, paths: Sequence[str], action: str, *, patience: float | None = None) -> dict[str, Entry]:
        """Entries of the paths that exist."""
        found: dict[str, Entry] = {}
        for start in range(0, len(paths), _AT_ONCE):
            asked = set(paths[start : start + _AT_ONCE])
            body = json.dumps({"paths": sorted(asked)}).encode()
            answer = self._call(action, "POST", f"{self._url}/paths-info", body, patience=patience)
            entries = (_entry(item) for item in self._items(answer, action))
            found.update((entry.path, entry) for entry in entries if entry is not None and entry.path in asked)
        return found

    def tree(self, prefix: str, *, recursive: bool, action: str) -> Iterator[Entry | str]:
        """Files below every name that begins with `prefix`, and names of folders unless `recursive`."""
        url: str | None = f"{self._url}/tree/{quote(prefix, safe='')}?recursive={str(recursive).lower()}"
        asked: set[str] = set()
        while url is not None:
            if url in asked or len(asked) >= _MAX_PAGES:
                raise BucketError(f"cannot {action} in bucket {self.place.bucket}: the Hub's pages do not end")
            asked.add(url)
            answer = self._call(action, "GET", url)
            for item in self._items(answer, action):
                if item.get("type") == "directory" and isinstance(item.get("path"), str):
                    yield item["path"]
                elif (entry := _entry(item)) is not None:
                    yield entry
            url = answer.next_page

    def batch(self, operations: Sequence[Mapping[str, Any]], action: str, *, patience: float | None = None) -> None:
        """Add, copy and delete names. Not a transaction: some may be done although this raises.

        `Refused` if the Hub refused some of them; the others are done.
        """
        failures: list[dict[str, str]] = []
        for start in range(0, len(operations), _AT_ONCE):
            lines = (json.dumps(operation).encode() + b"\n" for operation in operations[start : start + _AT_ONCE])
            body, type_ = b"".join(lines), "application/x-ndjson"
            answer = self._answer(action, "POST", f"{self._url}/batch", body, type_, patience=patience)
            doc = answer.json() if answer.status in (200, 422) else None
            failed = doc.get("failed") if isinstance(doc, dict) else None
            if failed:
                failures += failed
            else:
                self._checked(answer, action)
        if failures:
            raise refused(failures, action, self.place)

    def model_files(self, repo: str, revision: str, paths: Sequence[str]) -> list[dict[str, Any]]:
        """Files of a model repository, as the Hub describes them."""
        url = f"{self.endpoint}/api/models/{repo}/paths-info/{quote(revision, safe='')}"
        form = "&".join(f"paths={quote(path, safe='')}" for path in paths).encode()
        action = f"look up {repo}"
        answer = self._answer(action, "POST", url, form, "application/x-www-form-urlencoded")
        return self._items(self._checked(answer, action), action)

    # --- inside -------------------------------------------------------------------------------------

    def _call(
        self, action: str, method: str, url: str, body: bytes | None = None, *, patience: float | None = None
    ) -> Answer:
        answer = self._answer(action, method, url, body, "application/json", patience=patience)
        return self._checked(answer, action)

    def _checked(self, answer: Answer, action: str) -> Answer:
        if not 200 <= answer.status < 300:
            raise by_status(answer.status, answer.headers, answer.json(), action, self.place)
        return answer

    def _items(self, answer: Answer, action: str) -> list[dict[str, Any]]:
        doc = answer.json()
        if not isinstance(doc, list) or not all(isinstance(item, dict) for item in doc):
            raise self.place.not_a_hub(action)
        return doc

    def _answer(
        self, action: str, method: str, url: str, body: bytes | None, type_: str, *, patience: float | None = None
    ) -> Answer:
        """An answer with any status but those that may pass: these are repeated, as are broken connections."""
        deadline = Deadline(PATIENCE_SECONDS if patience is None else patience)
        for _ in attempts(deadline, waiting_for=f"the Hub ({action})", first=1.0, longest=8.0):
            failure, wait = self._attempt(action, method, url, body, type_)
            if isinstance(failure, Answer):
                return failure
            if wait >= deadline.left:  # also if the deadline has passed
                raise failure
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _attempt(
        self, action: str, method: str, url: str, body: bytes | None, type_: str
    ) -> tuple[Answer | BucketUnavailable, float]:
        """The answer, or a failure that may pass, and the seconds to wait before the next attempt."""
        try:
            answer = self._send(method, url, body, type_)
        except FOREIGN as error:
            raised = by_connection(error, action, self.place)
            if not isinstance(raised, BucketUnavailable):
                raise raised from None
            return raised, 0.0
        if answer.status not in _PASSING:
            return answer, 0.0
        wait = _pause(answer)
        failure = by_status(answer.status, answer.headers, answer.json(), action, self.place, wait=wait)
        assert isinstance(failure, BucketUnavailable)
        return failure, wait

    def _send(self, method: str, url: str, body: bytes | None, type_: str) -> Answer:
        headers = self.headers() | ({} if body is None else {"Content-Type": type_})
        deadline = Deadline(ANSWER_SECONDS)
        with get_session().stream(
            method, url, headers=headers, content=body, timeout=SILENCE_SECONDS, follow_redirects=True
        ) as response:
            received = bytearray()
            for block in response.iter_bytes():
                received += block
                if len(received) > _MAX_ANSWER:
                    raise ValueError(f"its answer is larger than {_MAX_ANSWER >> 20} MB")
                if deadline.passed:
                    raise TimeoutError(f"its answer was not complete after {ANSWER_SECONDS:.0f} s")
            following = response.links.get("next", {}).get("url")
            return Answer(response.status_code, response.headers, bytes(received), following)


def _pause(answer: Answer) -> float:
    """Seconds that the Hub asks to wait before the next request."""
    limit = parse_ratelimit_headers(answer.headers)
    if answer.status == 429 and limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    after = answer.headers.get("Retry-After", "").strip()
    return float(after) if after.isdecimal() else 0.0


def _entry(item: Mapping[str, Any]) -> Entry | None:
    """A file as a listing describes it. None for something else."""
    path, size, content, uploaded = (item.get(name) for name in ("path", "size", "xetHash", "uploadedAt"))
    if item.get("type") != "file" or not isinstance(path, str) or type(size) is not int or not isinstance(content, str):
        return None
    try:
        # `mtime` would be the uploader's clock.
        date = str(uploaded or "").replace("Z", "+00:00")  # Python 3.10 knows no Z
        modified = datetime.fromisoformat(date).timestamp() if date else None
    except ValueError:
        modified = None
    return Entry(path, size, content, modified)
