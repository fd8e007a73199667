# Copyright 2026 The hubsync authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

# /// script
# dependencies = [
#     "hubsync-rl[trl]",
# ]
#
# [tool.uv.sources]
# hubsync-rl = { path = "../.." }
# ///

"""Rollouts from all servers of a run, while a trainer moves their weights; see README.md.

python examples/rollouts/rollouts.py --servers http://localhost:8000 http://localhost:8001
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from trl import TrlParser

from hubsync.lifecycle.rollouts.sampler import Sample, Sampler
from hubsync.lifecycle.rollouts.window import AdaptiveWindow

PROMPTS = [f"{a} plus {b} makes" for a in range(3, 8) for b in range(11, 15)]


def reward(sample: Sample) -> float:
    """Shorter is better: put your own here."""
    return 1.0 / len(sample.token_ids)


@dataclass
class RolloutArguments:
    """Arguments of this script."""

    servers: list[str] = field(metadata={"help": "URLs of the servers of one run."})
    k: int = field(default=8, metadata={"help": "Samples per prompt."})
    max_tokens: int = field(default=64, metadata={"help": "Longest sample, in tokens."})
    max_lag: int = field(default=2, metadata={"help": "Versions that a sample may be behind the newest seen."})


async def main(options: RolloutArguments) -> None:
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
    asyncio.run(main(*TrlParser((RolloutArguments,)).parse_args_and_config()))
