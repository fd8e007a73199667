"""Rollouts from all servers of a run, while a trainer moves their weights; see README.md.

python examples/rollouts/rollouts.py http://localhost:8000 http://localhost:8001
"""

from __future__ import annotations

import argparse
import asyncio

from hubsync.lifecycle.rollouts.sampler import Sample, Sampler
from hubsync.lifecycle.rollouts.window import AdaptiveWindow

PROMPTS = [f"{a} plus {b} makes" for a in range(3, 8) for b in range(11, 15)]


def reward(sample: Sample) -> float:
    """Shorter is better: put your own here."""
    return 1.0 / len(sample.token_ids)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("servers", nargs="+")
    parser.add_argument("--k", type=int, default=8, help="samples per prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-lag", type=int, default=2, help="versions that a sample may be behind the newest seen")
    options = parser.parse_args()

    newest, used, stale = 0, 0, 0
    async with Sampler(options.servers, window=AdaptiveWindow(max_window=128)) as sampler:
        async for sample in sampler.sample(PROMPTS, options.k, logprobs=True, max_tokens=options.max_tokens):
            newest = max(newest, sample.max_version)
            if newest - sample.min_version > options.max_lag:
                stale += 1
                continue
            used += 1
            versions = " then ".join(f"{span.version} ({span.end - span.start} tokens)" for span in sample.spans)
            versions = versions or f"{sample.min_version} to {sample.max_version}"  # without --enable-scale-out
            print(
                f"prompt {sample.prompt}.{sample.k}: reward {reward(sample):.3f}, {sample.replica}, version {versions}"
            )
    print(f"{used} samples, {stale} too old")


if __name__ == "__main__":
    asyncio.run(main())
