"""Check what hubsync assumes of the Hub, in a temporary private bucket that is deleted afterwards.

    HF_TOKEN=... python -m tests.hub                            # the Hub, about two minutes
    HF_ENDPOINT=http://127.0.0.1:8418 python -m tests.hub       # a local one (`hubsync hub`)

Exit code 0: everything that hubsync relies on holds. DIFFERS: another answer than the docs state, which it handles.
1: something FAILED; please report the whole output.
"""

from __future__ import annotations

import argparse
import os
import sys

from huggingface_hub import HfApi, get_token

from hubsync import __version__

from .a_run import publish_follow_roll_back
from .checks import ASSUMPTIONS, as_json
from .measuring import DIFFERS, FAILED, SKIPPED, Site, a_name, counting, temporary_bucket


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make test-hub", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--namespace", help="where the bucket is made (default: the token's user)")
    parser.add_argument("--model", metavar="REPO", help="a model repository with a model.safetensors, to copy it")
    parser.add_argument("--rounds", type=int, default=8, help="measurements of each latency (default: %(default)s)")
    parser.add_argument(
        "--wait", type=float, default=20.0, metavar="SECONDS", help="how long replaced content must stay readable"
    )
    parser.add_argument(
        "--interval",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="of polls without events (default: %(default)g)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    args = parser.parse_args(argv)
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    os.environ["HF_ENDPOINT"], token = endpoint, get_token()
    if token is None:
        print("no token: run `hf auth login`, or set HF_TOKEN to one that may write", file=sys.stderr)
        return 2
    namespace = args.namespace or HfApi(endpoint=endpoint, token=token).whoami()["name"]
    site = Site(endpoint, token, a_name(namespace), args.wait, args.rounds, args.interval, args.model)
    print(f"hubsync {__version__}, {endpoint}")
    with counting(site), temporary_bucket(site):
        for check in (publish_follow_roll_back, *ASSUMPTIONS):
            site.run(check)
    verdicts = [result.verdict for result in site.results]
    found = {verdict: verdicts.count(verdict) for verdict in (FAILED, DIFFERS, SKIPPED)}
    print(f"{len(site.results)} lines: " + ", ".join(f"{number} {verdict}" for verdict, number in found.items()))
    print(f"{site.calls} API calls in all")
    if args.json:
        with open(args.json, "w") as file:
            file.write(as_json(site))
    return 1 if found[FAILED] else 0


if __name__ == "__main__":
    sys.exit(main())
