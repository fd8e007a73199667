"""`hubsync follow`: keep one inference server at the version that a run serves."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hubsync.apply.protocol import KV_POLICIES, KvPolicy
from hubsync.cache import default_cache
from hubsync.errors import ConfigError

from . import options

if TYPE_CHECKING:
    from hubsync.errors import HubsyncError
    from hubsync.format.manifest import Position
    from hubsync.replicas.follower import Followed, Follower
    from hubsync.replicas.reports import ReplicaStatus
    from hubsync.replicas.status_objects import StatusReporter

_GRACE_S = 10.0  # for a commit in progress when the command is stopped

HELP = "keep a vLLM server at the served version of a run"
DESCRIPTION = """\
Keep one vLLM server at the version that a run serves: look at the run's head in the bucket, at once when the Hub
reports a change and otherwise at intervals, and commit each new version on the server. Use it for a server that the
trainer cannot reach: it connects to the Hub and to that server only. Several followers of one server, and trainers that
push to it, do not interfere with each other.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_address(parser, optional=True)
    parser.add_argument("--bucket", metavar="ADDRESS", help=argparse.SUPPRESS)  # the address, as older versions took it
    parser.add_argument("--server", required=True, metavar="URL", help="the server, such as http://127.0.0.1:8000")
    parser.add_argument(
        "--interval",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="longest time between polls (default: %(default)g)",
    )
    parser.add_argument(
        "--kv-cache",
        choices=KV_POLICIES,
        default=KvPolicy.DEFAULT,
        help="what a commit does with the KV caches of running requests (default: %(default)s)",
    )
    parser.add_argument(
        "--stage-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="time the server may take to attach to the run, or to stage a version (default: %(default)g)",
    )
    options.add_max_head_age(parser)
    parser.add_argument(
        "--cache",
        metavar="DIR",
        help="directory that records the newest version seen (default: HUBSYNC_CACHE, or ~/.cache/hubsync)",
    )
    parser.add_argument(
        "--report-status",
        action="store_true",
        help="also write the server's status to the bucket, for `hubsync watch`; the token must be able to write",
    )
    parser.add_argument("--once", action="store_true", help="poll once, bring the server to the version, and exit")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    options.add_api_key(parser)
    options.add_read_access(parser)


def run(args: argparse.Namespace) -> int:
    """Follow until SIGINT or SIGTERM, or once with `--once`."""
    if (args.address is None) == (args.bucket is None):
        raise ConfigError("give the ADDRESS of the run, once: hubsync follow ADDRESS --server URL")
    args.address = args.address or args.bucket
    follower = _follower(args)
    reporter = _reporter(args) if args.report_status else None
    report = _print_if_possible(_print_json if args.json else _print_line)
    follower.on_commit = lambda followed: report(_commit_event(followed, args.server))
    follower.on_error = lambda error, retry_s: report(_error_event(error, retry_s, args.server))
    if args.json:
        follower.on_status = _Verifications(report, args.server).status
    if reporter is not None:
        follower.on_status = _each(follower.on_status, reporter.status)
        follower.on_error = _both(follower.on_error, reporter)
    if not args.once:
        if not args.json:
            report({"event": "start", "run": args.address, "server": args.server, "interval_s": args.interval})
            follower.on_found = lambda served, status: report(
                {"event": "found", "served": served, "at": status.position}
            )
        return _run_until_stopped(follower)
    try:
        followed = follower.step()
    finally:
        if reporter is not None:
            reporter.close(wait_s=_GRACE_S)
    if followed is not None:
        follower.on_commit(followed)
    elif not args.json:
        print("nothing to do: the server is at the served version, or another client is bringing it there")
    return 0


def _follower(args: argparse.Namespace) -> Follower:
    from hubsync.bucket import open_bucket
    from hubsync.chain import ChainReader
    from hubsync.replicas.engines import connect
    from hubsync.replicas.follower import Follower
    from hubsync.replicas.replica import Replica

    from .access import public_key

    key, cache = public_key(args), args.cache or default_cache()

    def reader() -> ChainReader:
        bucket = open_bucket(args.address, token=args.token, key=key)
        return ChainReader(bucket, cache, max_head_age=args.max_head_age)

    return Follower(
        reader,
        Replica(connect(args.server, args.api_key), args.kv_cache),
        interval=args.interval,
        stage_timeout=args.stage_timeout,
    )


def _reporter(args: argparse.Namespace) -> StatusReporter:
    """Writes without a key: status objects are not signed, and a follower has only the public key."""
    from hubsync.bucket import open_bucket
    from hubsync.replicas.status_objects import StatusReporter

    return StatusReporter(lambda: open_bucket(args.address, token=args.token), args.server)


def _each(*functions: Callable[[ReplicaStatus], None]) -> Callable[[ReplicaStatus], None]:
    def call(status: ReplicaStatus) -> None:
        for function in functions:
            function(status)

    return call


def _both(
    on_error: Callable[[HubsyncError, float], None], reporter: StatusReporter
) -> Callable[[HubsyncError, float], None]:
    def report(error: HubsyncError, retry_s: float) -> None:
        on_error(error, retry_s)
        reporter.error(error)

    return report


def _run_until_stopped(follower: Follower) -> int:
    """Run in a second thread: a request to a Hub that is down may return long after the signal to stop."""
    ended = threading.Event()
    failures: list[Exception] = []

    def work() -> None:
        try:
            follower.run()
        except Exception as error:  # any error here ends the command with a failure
            failures.append(error)
        finally:
            ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    thread = threading.Thread(target=work, name="hubsync-follow", daemon=True)
    thread.start()
    ended.wait()
    follower.stop()
    thread.join(_GRACE_S)
    if failures:
        raise failures[0]
    return 0


class _Verifications:
    """Reports once for each version that the server has verified its weights."""

    def __init__(self, report: Callable[[dict[str, Any]], None], server: str):
        self._report = report
        self._server = server
        self._last: Position | None = None

    def status(self, status: ReplicaStatus) -> None:
        looks, position, seconds = status.verification, status.position, status.seconds.get("verify")
        if looks is None or not looks.verified or position is None or position == self._last or seconds is None:
            return
        self._last = position
        self._report(
            {
                **_head("verified", self._server),
                "version": position.version,
                "digest": position.digest,
                "verify_s": round(seconds, 4),
            }
        )


def _head(event: str, server: str) -> dict[str, Any]:
    """What events begin with. `time`: seconds since 1970, by the follower's clock."""
    from hubsync.replicas.server import plain_url

    return {"event": event, "time": round(time.time(), 3), "server": plain_url(server)}


def _commit_event(followed: Followed, server: str) -> dict[str, Any]:
    commit = followed.commit
    return {
        **_head("commit", server),
        "version": commit.version,
        "digest": commit.position.digest,
        "lag": followed.lag,
        "changed": commit.changed,
        "bytes": followed.nbytes,
        "stage_s": round(commit.stage_s, 4),
        "commit_s": round(commit.commit_s, 4),
        "pause_s": round(commit.pause_s, 4),
    }


def _error_event(error: HubsyncError, retry_s: float, server: str) -> dict[str, Any]:
    what = {"error": type(error).__name__, "message": str(error), "retry_s": round(retry_s, 1)}
    return {**_head("error", server), **what}


def _print_if_possible(show: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """`show`, but go on if the output is a file on a disk that is full: following goes on, and that can be cured."""

    def report(event: dict[str, Any]) -> None:
        try:
            show(event)
        except BrokenPipeError:  # nobody reads
            raise
        except OSError:
            pass  # there is no place to say it

    return report


def _print_json(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def _print_line(event: dict[str, Any]) -> None:
    from hubsync.replicas.server import plain_url

    now = datetime.now().strftime("%H:%M:%S")
    if event["event"] == "start":
        where = f"{event['run']} on {plain_url(event['server'])}"
        print(f"{now} following {where}: a look every {event['interval_s']:g} s, a line for each commit", flush=True)
        return
    if event["event"] == "found":
        at = "none of its versions yet" if event["at"] is None else f"version {event['at'].version}"
        print(f"{now} the run exists and serves {event['served']}; the server is at {at}", flush=True)
        return
    if event["event"] == "error":
        print(
            f"{now} {event['error']}: {event['message']}; next try in {event['retry_s']} s", file=sys.stderr, flush=True
        )
        return
    changed = "?" if event["changed"] is None else f"{event['changed']:,}"
    nbytes = "?" if event["bytes"] is None else f"{event['bytes']:,}"
    where = f"{now} version {event['version']} ({event['digest'][:12]}), lag {event['lag']}"
    times = ", ".join(f"{phase} {event[f'{phase}_s']:.3f} s" for phase in ("stage", "commit", "pause"))
    print(f"{where}: {changed} elements, {nbytes} bytes, {times}", flush=True)
