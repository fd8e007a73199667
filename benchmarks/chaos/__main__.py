"""Play random histories of kills, stalls and faults. Every replica must be exact, or report that it is not."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .play import Outcome


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.kinds:
        from .events import ENDLESS, EVENTS

        kinds = ENDLESS if arguments.endless else EVENTS
        print(json.dumps([event.kind for event in kinds.values()]))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends all processes too
    root = Path(tempfile.mkdtemp(prefix="hubsync-chaos-"))
    _set_environment(root)
    from .play import Manner, play_all, prepare  # these import modules that read the environment

    began = time.monotonic()
    prepare()
    seeds = arguments.only or range(arguments.seed, arguments.seed + arguments.runs)
    outcomes = []
    manner = Manner(
        plant=arguments.plant,
        endless=arguments.endless,
        vllm=arguments.vllm,
        cover=arguments.runs if arguments.cover else 0,
    )
    for outcome in play_all(seeds, arguments.jobs, root, manner):
        outcomes.append(outcome)
        if not arguments.json:
            _progress(outcome, root)
    report = summary(outcomes)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print_table(report, time.monotonic() - began)
    if report["failures"]:
        return 1
    shutil.rmtree(root)
    return 0


def summary(outcomes: list[Outcome]) -> dict[str, object]:
    """The report that `--json` prints."""
    divergent = [outcome for outcome in outcomes if outcome.divergence is not None]
    absent = [outcome for outcome in outcomes if outcome.out_of_service]
    kinds = Counter(kind for outcome in outcomes for kind in outcome.occurred)
    return {
        "runs": len(outcomes),
        "histories_by_fault": dict(sorted(kinds.items())),
        "silent_divergence": len(divergent),
        "silent_divergence_seeds": sorted(outcome.seed for outcome in divergent),
        "out_of_service": len(absent),
        "out_of_service_seeds": {str(outcome.seed): outcome.out_of_service for outcome in absent},
        "loud_errors": dict(sorted(sum((outcome.loud for outcome in outcomes), Counter()).items())),
        "failures": [
            {"seed": outcome.seed, "what": outcome.divergence or outcome.failure, "log": outcome.log}
            for outcome in outcomes
            if not outcome.exact
        ],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--runs", type=int, default=50, help="histories, one for each seed")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--only", type=int, nargs="+", metavar="SEED", help="the scripts of these seeds; moments of kills differ"
    )
    parser.add_argument("--cover", action="store_true", help="share all kinds of events among the histories, each once")
    parser.add_argument("--jobs", type=int, default=4 * (os.cpu_count() or 1), help="histories at a time")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    parser.add_argument("--kinds", action="store_true", help="only list the kinds of events, as JSON")
    parser.add_argument(
        "--vllm", action="store_true", help="replicas are real vLLM servers: minutes per history (use --jobs 1)"
    )
    parser.add_argument(
        "--endless",
        action="store_true",
        help="each history has one fault of the Hub that outlasts all retries; seeds go through the kinds",
    )
    parser.add_argument(
        "--plant",
        action="store_true",
        help="flip a bit of a replica after its last verification: the judge must report every history as divergent",
    )
    return parser


def _set_environment(root: Path) -> None:
    """Keep away from the public Hub, and retry quickly, because faults are many."""
    os.environ.update(
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(root / "hf"),
        HF_TOKEN="hf_chaos",
        HF_XET_TELEMETRY_ENABLED="false",
        HF_XET_CLIENT_RETRY_BASE_DELAY="20ms",
        HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="3",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        OMP_NUM_THREADS="1",
    )


def _progress(outcome: Outcome, root: Path) -> None:
    if outcome.exact:
        print(".", end="", flush=True)
        return
    print(f"\nseed {outcome.seed}: {outcome.divergence or outcome.failure}\n    {root / str(outcome.seed)}", flush=True)
    for line in outcome.log:
        print(f"    {line}")


def _print_table(report: dict[str, object], seconds: float) -> None:
    print(f"\n{'event':24}histories")
    for name in ("histories_by_fault", "loud_errors"):
        rows = report[name]
        assert isinstance(rows, dict)
        if name == "loud_errors":
            print(f"\n{'error reported':24}times")
        for kind, count in rows.items():
            print(f"{kind:24}{count}")
    failures = report["failures"]
    assert isinstance(failures, list)
    print(
        f"\n{report['runs']} histories in {seconds:.0f} s: {report['silent_divergence']} silent divergences, "
        f"{len(failures)} failures; in {report['out_of_service']} a replica ended out of service, and reported it"
    )
    if failures:
        print(f"to repeat: python -m benchmarks.chaos --only {failures[0]['seed']}")


if __name__ == "__main__":
    sys.exit(main())
