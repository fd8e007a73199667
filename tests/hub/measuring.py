"""Results of checks, counted requests, and a temporary bucket that is deleted in any case."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import HfApi

from hubsync.bucket.hub import HubBucket
from hubsync.bucket.hub_api import HubApi

OK, DIFFERS, FAILED, SKIPPED = "ok", "DIFFERS", "FAILED", "skipped"


@dataclass(frozen=True)
class Result:
    """One line of the report.

    Attributes:
        verdict: OK; DIFFERS from the docs, which hubsync handles; FAILED: hubsync relies on it; SKIPPED.
        what: what was checked.
        measured: what was found.
        stated: what the docs or the code state.
    """

    verdict: str
    what: str
    measured: str
    stated: str = ""


@dataclass
class Site:
    """The Hub under test, a temporary bucket there, and the results so far.

    Attributes:
        endpoint, token: of the Hub.
        name: `<namespace>/<bucket>`.
        wait_s: how long the content of replaced names must stay readable to count as kept.
        rounds: measurements of a latency.
        interval: seconds, of the poll without events.
        model: a model repository to copy a file from, or None.
    """

    endpoint: str
    token: str
    name: str
    wait_s: float
    rounds: int
    interval: float
    model: str | None
    results: list[Result] = field(default_factory=list)
    calls: int = 0

    def bucket(self, run: str, *, create: bool = False) -> HubBucket:
        return HubBucket(f"hf://buckets/{self.name}/{run}", create=create, token=self.token, endpoint=self.endpoint)

    def say(self, verdict: str, what: str, measured: str, stated: str = "") -> None:
        self.results.append(Result(verdict, what, measured, stated))
        print(f"{verdict:8} {what:44} {measured:58} {f'docs: {stated}' if stated else ''}".rstrip(), flush=True)

    def counted(self, act: Callable[[], Any]) -> int:
        """API calls of this process while `act` runs."""
        before = self.calls
        act()
        return self.calls - before

    def run(self, check: Callable[[Site], None]) -> None:
        """A check that raises is a line of the report too; the others go on."""
        try:
            check(self)
        except Exception as error:
            name = check.__name__.replace("_", " ")
            self.say(FAILED, name, f"{type(error).__name__}: {error}")


@contextmanager
def temporary_bucket(site: Site) -> Iterator[None]:
    """Create the bucket, private, and delete it with everything in it, also after an interrupt."""
    api = HfApi(endpoint=site.endpoint, token=site.token)
    try:
        began = time.monotonic()
        bucket = site.bucket("run", create=True)
        took = f"{site.name} in {time.monotonic() - began:.2f} s"
        site.say(OK if bucket._api.is_private(patience=10.0) else FAILED, "create a private bucket", took, "private")
        yield
    finally:
        api.delete_bucket(site.name, missing_ok=True)
        print(f"{site.name} was deleted", file=sys.stderr)


@contextmanager
def counting(site: Site) -> Iterator[None]:
    """Count the API calls of all buckets of this process."""
    attempt = HubApi._attempt

    def counted(api: HubApi, *args: Any) -> Any:
        site.calls += 1
        return attempt(api, *args)

    HubApi._attempt = counted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        HubApi._attempt = attempt  # type: ignore[method-assign]


def a_name(namespace: str) -> str:
    return f"{namespace}/hubsync-test-{secrets.token_hex(4)}"


def seconds(values: list[float]) -> str:
    """Median and longest of some latencies."""
    ordered = sorted(values)
    return f"median {ordered[len(ordered) // 2]:.2f} s, longest {ordered[-1]:.2f} s of {len(ordered)}"
