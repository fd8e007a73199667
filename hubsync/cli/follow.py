"""`hubsync follow`: keep one vLLM server at the version that a run serves, from beside it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from datetime import datetime
from typing import Any

from hubsync.apply.protocol import KV_POLICIES, KvPolicy
from hubsync.bucket import open_bucket
from hubsync.cache import default_cache
from hubsync.chain import ChainReader
from hubsync.errors import HubsyncError
from hubsync.replicas.engines import connect
from hubsync.replicas.follower import Followed, Follower
from hubsync.replicas.replica import Replica

from .keys import add_public_key, public_key

_GRACE_S = 10.0  # for a commit under way when we are told to stop

DESCRIPTION = """\
Keep one vLLM server at the version that a run serves: look at the run's head in the bucket again and again, and bring
the server to it. Run it beside a server that nobody can reach from outside: it needs the Hub and that server only.
Several followers of one server, and publishers that push to it, do not disturb each other.
"""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("follow", help="keep a vLLM server at the version of a run", description=DESCRIPTION)
    parser.add_argument(
        "--bucket", required=True, metavar="ADDRESS", help="hf://buckets/NAMESPACE/NAME/RUN, or a directory"
    )
    parser.add_argument(
        "--server", required=True, metavar="URL", help="of the vLLM server, such as http://127.0.0.1:8000"
    )
    parser.add_argument(
        "--interval", type=float, default=5.0, metavar="S", help="seconds between two looks (default: %(default)g)"
    )
    parser.add_argument(
        "--kv-cache",
        choices=KV_POLICIES,
        default=KvPolicy.RECOMPUTE,
        help="what happens at a commit to keys and values of running requests (default: %(default)s)",
    )
    parser.add_argument(
        "--stage-timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds the server may take to find its place, or to prepare a version (default: %(default)g)",
    )
    parser.add_argument(
        "--max-head-age",
        type=float,
        metavar="S",
        help="refuse to join a run whose head was written longer ago than that (default: no limit)",
    )
    parser.add_argument(
        "--cache",
        default=str(default_cache()),
        metavar="DIR",
        help="where to remember the newest version seen (default: HUBSYNC_CACHE, or %(default)s)",
    )
    parser.add_argument("--once", action="store_true", help="look once, bring the server there, and end")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--token", help="Hugging Face token (default: HF_TOKEN, or that of `hf auth login`)")
    parser.add_argument(
        "--api-key", default=os.environ.get("VLLM_API_KEY"), help="of the server (default: VLLM_API_KEY)"
    )
    add_public_key(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Follow until interrupted or terminated."""
    key = public_key(args)
    follower = Follower(
        lambda: ChainReader(
            open_bucket(args.bucket, token=args.token, key=key), args.cache, max_head_age=args.max_head_age
        ),
        Replica(connect(args.server, args.api_key), args.kv_cache),
        interval=args.interval,
        stage_timeout=args.stage_timeout,
    )
    tell = _tell_json if args.json else _tell
    follower.on_commit = lambda followed: tell(_commit(followed))
    follower.on_error = lambda error, retry_s: tell(_error(error, retry_s))
    if args.once:
        followed = follower.step()
        if followed is not None:
            follower.on_commit(followed)
        elif not args.json:
            print("nothing to do: the server is at the version to be served, or somebody else is bringing it there")
        return 0
    return _run_until_told(follower)


def _run_until_told(follower: Follower) -> int:
    """Beside this thread, because a request to a Hub that is down returns long after we are told to stop."""
    ended = threading.Event()
    failures: list[Exception] = []

    def work() -> None:
        try:
            follower.run()
        except Exception as error:  # whatever it is, it is not an end that was asked for
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


def _commit(followed: Followed) -> dict[str, Any]:
    commit = followed.commit
    return {
        "event": "commit",
        "version": commit.version,
        "digest": commit.position.digest,
        "lag": followed.lag,
        "changed": commit.changed,
        "bytes": followed.nbytes,
        "stage_s": round(commit.stage_s, 4),
        "commit_s": round(commit.commit_s, 4),
        "pause_s": round(commit.pause_s, 4),
    }


def _error(error: HubsyncError, retry_s: float) -> dict[str, Any]:
    return {"event": "error", "error": type(error).__name__, "message": str(error), "retry_s": round(retry_s, 1)}


def _tell_json(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def _tell(event: dict[str, Any]) -> None:
    now = datetime.now().strftime("%H:%M:%S")
    if event["event"] == "error":
        print(
            f"{now} {event['error']}: {event['message']}; next try in {event['retry_s']} s", file=sys.stderr, flush=True
        )
        return
    changed = "?" if event["changed"] is None else f"{event['changed']:,}"
    nbytes = "?" if event["bytes"] is None else f"{event['bytes']:,}"
    where = f"{now} version {event['version']} ({event['digest'][:12]}), lag {event['lag']}"
    times = ", ".join(f"{what} {event[f'{what}_s']:.3f} s" for what in ("stage", "commit", "pause"))
    print(f"{where}: {changed} elements, {nbytes} bytes, {times}", flush=True)
