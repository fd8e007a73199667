"""The assumptions of docs/operations.md, by their numbers there; each function is one check."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session, parse_ratelimit_headers

from hubsync.bucket import Download, Upload
from hubsync.bucket.changes import Changes
from hubsync.bucket.hub import LAG_SECONDS, HubBucket
from hubsync.bucket.hub_errors import Refused
from hubsync.errors import BucketDenied, BucketError, BucketMissing
from hubsync.retry import Deadline, attempts

from .measuring import DIFFERS, FAILED, OK, SKIPPED, Site, seconds

_GIVEN_UP_S = 4 * LAG_SECONDS


def _until(condition: Callable[[], bool], timeout_s: float = _GIVEN_UP_S) -> float:
    """Seconds until a condition held. TimeoutError if it never did."""
    began = time.monotonic()
    for _ in attempts(timeout_s, waiting_for="the Hub", first=0.02, longest=0.5):
        if condition():
            return time.monotonic() - began
    raise TimeoutError(f"not within {timeout_s:.0f} s")


def _write(bucket: HubBucket, path: str, data: bytes) -> str:
    """Point a name to new content, and do not look whether it is visible. Returns the content's hash."""
    (content,) = bucket._upload([data], "write")
    bucket._api.batch([{"type": "addFile", "path": bucket._full(path), "xetHash": content, "mtime": 0}], "write")
    return content


def _shows(bucket: HubBucket, path: str, content: str) -> bool:
    stat = bucket.stat([path]).get(path)
    return stat is not None and stat.etag == content


def read_after_write_lag(site: Site) -> None:
    """1: a written name is readable within 30 s, and writes become visible in their order."""
    bucket, other = site.bucket("lag"), site.bucket("lag")
    lags: dict[str, list[float]] = {"new name": [], "replaced name": [], "name in a listing": []}
    disorder = backwards = 0
    for n in range(site.rounds):
        content = _write(bucket, f"new/{n}", secrets.token_bytes(64))
        lags["new name"].append(_until(lambda n=n, content=content: _shows(other, f"new/{n}", content)))  # type: ignore[misc]
        listed = lambda n=n: any(stat.path == f"new/{n}" for stat in other.list("new"))  # noqa: E731
        lags["name in a listing"].append(_until(listed))
        content = _write(bucket, "head", secrets.token_bytes(64))
        lags["replaced name"].append(_until(lambda content=content: _shows(other, "head", content)))  # type: ignore[misc]
        backwards += sum(not _shows(other, "head", content) for _ in range(3))
        first = _write(bucket, f"first/{n}", secrets.token_bytes(64))
        last = _write(bucket, f"last/{n}", secrets.token_bytes(64))
        found = other.stat([f"first/{n}", f"last/{n}"])
        disorder += f"last/{n}" in found and f"first/{n}" not in found
        _until(lambda n=n, first=first: _shows(other, f"first/{n}", first))  # type: ignore[misc]
        _until(lambda n=n, last=last: _shows(other, f"last/{n}", last))  # type: ignore[misc]
    for what, values in lags.items():
        verdict = OK if max(values) <= LAG_SECONDS else FAILED
        site.say(verdict, f"read after write, {what}", seconds(values), f"at most {LAG_SECONDS:.0f} s")
    what = "an older state after a newer one, by one reader"
    site.say(OK if not backwards else DIFFERS, what, f"{backwards} of {3 * site.rounds} looks", "none")
    what = "a later write visible before an earlier one"
    site.say(OK if not disorder else FAILED, what, f"{disorder} of {site.rounds} pairs", "never")


def content_of_replaced_names(site: Site) -> None:
    """2: it stays long enough for a reader that has looked the name up."""
    bucket = site.bucket("kept")
    data = [secrets.token_bytes(4096) for _ in range(2)]
    bucket.put([Upload("replaced", data[0]), Upload("deleted", data[1])])
    entries = bucket._look_up(["replaced", "deleted"])
    bucket.commit("replaced", b"another content")
    bucket.delete(["deleted"])
    time.sleep(site.wait_s)
    with tempfile.TemporaryDirectory() as directory:
        places = [(entries[path], Path(directory, path)) for path in ("replaced", "deleted")]
        bucket._download(places)
        kept = [place.read_bytes() for _, place in places] == data
    measured = f"{'readable' if kept else 'changed'} {site.wait_s:g} s later"
    site.say(OK if kept else FAILED, "content of replaced and deleted names", measured, "kept")


def answers_without_access(site: Site) -> None:
    """3: 401 without a token, also of a missing bucket; 404 of a missing one with a token. Messages depend on it."""
    session, headers = get_session(), {"Authorization": f"Bearer {site.token}"}
    missing = f"{site.name}-missing"
    for what, name, given, stated in (
        ("private bucket, no token", site.name, {}, 401),
        ("missing bucket, no token", missing, {}, 401),
        ("missing bucket, with a token", missing, headers, 404),
    ):
        status = session.get(f"{site.endpoint}/api/buckets/{name}", headers=given, timeout=20.0).status_code
        site.say(OK if status == stated else DIFFERS, what, f"status {status}", f"status {stated}")
    for token, expected in (("hf_" + "x" * 34, BucketDenied), (site.token, BucketMissing)):
        try:
            HubBucket(f"hf://buckets/{missing}/run", token=token, endpoint=site.endpoint)
        except BucketError as error:
            what = "error of a bad token" if token != site.token else "error of a missing bucket"
            verdict = OK if isinstance(error, expected) else DIFFERS
            site.say(verdict, what, type(error).__name__, expected.__name__)
    site.say(SKIPPED, "another user's bucket and namespace", "needs a second user", "404 and 403")


def listings(site: Site) -> None:
    """4: 1000 entries per page without `limit`, and complete while others write."""
    bucket = site.bucket("list")
    (content,) = bucket._upload([b"the same content"], "write")
    names = [f"{n:04d}" for n in range(1001)]
    operations = [{"type": "addFile", "path": bucket._full(name), "xetHash": content, "mtime": 0} for name in names]
    bucket._api.batch(operations, "write")
    _until(lambda: len(bucket.list()) == len(names))
    url = f"{site.endpoint}/api/buckets/{site.name}/tree/list%2F?recursive=true"
    page = get_session().get(url, headers={"Authorization": f"Bearer {site.token}"}, timeout=60.0).json()
    site.say(OK if len(page) == 1000 else DIFFERS, "entries of a page", str(len(page)), "1000")
    lost = 0
    for n in range(3):
        _write(bucket, f"new/{n}", secrets.token_bytes(64))
        lost += len(set(names) - {stat.path for stat in bucket.list()})
    site.say(OK if not lost else FAILED, "a listing of 1001 names, after writes", f"{lost} names missing", "complete")


def rate_limits(site: Site) -> None:
    """5: token calls count against the API limit. What else runs with this token disturbs this check."""
    session, headers = get_session(), {"Authorization": f"Bearer {site.token}"}
    url = f"{site.endpoint}/api/buckets/{site.name}"
    limits = [
        parse_ratelimit_headers(session.get(url + path, headers=headers, timeout=20.0).headers)
        for path in ("", "/xet-read-token", "")
    ]
    first, last = limits[0], limits[-1]
    if first is None or last is None:
        site.say(SKIPPED, "token calls count as API calls", "no RateLimit headers", "they do")
        return
    used = first.remaining - last.remaining
    site.say(OK if used == 2 else DIFFERS, "token calls count as API calls", f"{used} of 2 calls counted", "they do")
    measured = f"{first.limit} in {first.window_seconds} s, class {first.resource_type}"
    site.say(OK, "limit of this token", measured, "free: 1000 in 300 s")


def copies_from_a_model(site: Site) -> None:
    """6: copying within the Hub from a model repository."""
    if site.model is None:
        site.say(SKIPPED, "copy from a model repository", "give --model REPO", "copied without a transfer")
        return
    bucket, began = site.bucket("copied"), time.monotonic()
    copied = bucket.copy_in(site.model, "main", {"model.safetensors": "model.safetensors"})
    if copied is None:
        site.say(DIFFERS, "copy from a model repository", f"{site.model}: not copied, it would be uploaded", "copied")
        return
    size = copied["model.safetensors"].size
    measured = f"{size:,} bytes in {time.monotonic() - began:.2f} s"
    site.say(OK, "copy from a model repository", measured, "copied without a transfer")
    stat = bucket.stat(["model.safetensors"])["model.safetensors"]
    site.say(OK if stat.modified else FAILED, "time of a copy", str(stat.modified), "always there")


def clocks(site: Site) -> None:
    """7: `uploadedAt` is always there, and is the Hub's clock; the `Date` of an answer is not from a cache."""
    bucket = site.bucket("clock")
    before = bucket.now()
    bucket.commit("head", secrets.token_bytes(64))
    stat, after = bucket.stat(["head"])["head"], bucket.now()
    if stat.modified is None:
        site.say(FAILED, "time of a written name", "none", "always there")
        return
    inside = before - 2 <= stat.modified <= after + 2
    measured = f"{stat.modified - before:+.1f} s from the Date before the write"
    site.say(OK if inside else DIFFERS, "`uploadedAt` is the Hub's clock", measured, "the same clock")
    site.say(OK, "this machine's clock", f"{time.time() - after:+.1f} s from the Hub's", "not used")


def deletes_of_missing_names(site: Site) -> None:
    """8: an error or not; both are handled."""
    bucket = site.bucket("deleted")
    try:
        bucket._api.batch([{"type": "deleteFile", "path": bucket._full("never-written")}], "delete")
        measured = "no error"
    except Refused as error:
        measured = "refused" if "refused" in str(error) else str(error)
    bucket.delete(["never-written"])
    site.say(OK, "delete of a missing name", measured, "both are handled")


def public_buckets(site: Site) -> None:
    """9: `create` of an existing public bucket leaves it public. hubsync looks, and warns."""
    name, said = f"{site.name}-public", []
    api, handler = HfApi(endpoint=site.endpoint, token=site.token), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    try:
        api.create_bucket(name, private=False)
        logging.getLogger("hubsync").addHandler(handler)
        bucket = HubBucket(f"hf://buckets/{name}/run", create=True, token=site.token, endpoint=site.endpoint)
        warned = any("is public" in message for message in said)
        public = not bucket._api.is_private(patience=5.0)
        measured = f"{'still public' if public else 'private'}, {'with' if warned else 'without'} a warning"
        site.say(OK if warned and public else DIFFERS, "create of an existing public bucket", measured, "warned")
    except HfHubHTTPError as error:
        site.say(SKIPPED, "create of an existing public bucket", f"cannot make one: {error.response.status_code}")
    finally:
        logging.getLogger("hubsync").removeHandler(handler)
        api.delete_bucket(name, missing_ok=True)


def event_stream(site: Site) -> None:
    """10: the event stream of buckets."""
    bucket, latencies = site.bucket("events"), []
    with bucket.changes(["head.json"]) as changes:
        if type(changes) is Changes:
            site.say(DIFFERS, "event stream", "this huggingface_hub has no client for it", "huggingface_hub >= 2.3")
            return
        began = time.monotonic()
        if not changes.wait(20.0):
            site.say(DIFFERS, "event stream", "not ready after 20 s: followers poll", "ready")
            return
        site.say(OK, "event stream ready", f"{time.monotonic() - began:.2f} s", "see docs/replicas.md")
        lost = 0
        for _ in range(site.rounds):
            _flushed(changes)
            began = time.monotonic()
            bucket.commit("head.json", secrets.token_bytes(64))
            if changes.wait(10.0):
                latencies.append(time.monotonic() - began)
            else:
                lost += 1
    what = "events of writes that did not arrive"
    site.say(OK if not lost else DIFFERS, what, f"{lost} of {site.rounds} in 10 s", "each costs the interval")
    if latencies:
        site.say(OK, "from the begin of a write to its event", seconds(latencies))


def _flushed(changes: Changes) -> None:
    """Wait until no report of an earlier write is left, and let the next one end a pause at once."""
    changes._repeat = None
    while changes.wait(0.3):
        changes._repeat = None
    changes._soonest = Deadline(0.0)


def calls_of_methods(site: Site) -> None:
    """API calls of each method of a bucket, against `HubBucket.API_CALLS`."""
    bucket = site.bucket("calls")
    bucket.commit("head.json", os.urandom(10))
    bucket.read(["head.json"])  # tokens of the storage are known then
    data = os.urandom(1000)
    with tempfile.TemporaryDirectory() as directory:
        wanted = Download("part", len(data), hashlib.sha256(data).hexdigest(), Path(directory, "part"))
        acts: dict[str, Callable[[], object]] = {
            "open": lambda: site.bucket("calls"),
            "put": lambda: bucket.put([Upload("part", data)]),
            "commit": lambda: bucket.commit("head.json", os.urandom(10)),
            "read": lambda: bucket.read(["head.json"]),
            "stat": lambda: bucket.stat(["head.json"]),
            "list": lambda: bucket.list(),
            "fetch": lambda: bucket.fetch([wanted]),
            "delete": lambda: bucket.delete(["part"]),
            "now": bucket.now,
        }
        took = {}
        for name, act in acts.items():
            began = time.monotonic()
            calls, stated = site.counted(act), HubBucket.API_CALLS[name]
            took[name] = time.monotonic() - began
            if calls > stated:
                site.say(DIFFERS, f"API calls of {name}", str(calls), f"at most {stated}")
    measured = ", ".join(f"{name} {taken:.2f}" for name, taken in took.items())
    site.say(OK, "seconds of each method", measured)


ASSUMPTIONS = (
    read_after_write_lag,
    content_of_replaced_names,
    answers_without_access,
    listings,
    rate_limits,
    copies_from_a_model,
    clocks,
    deletes_of_missing_names,
    public_buckets,
    event_stream,
    calls_of_methods,
)


def as_json(site: Site) -> str:
    return json.dumps([vars(result) for result in site.results], indent=1)
