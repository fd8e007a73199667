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

"""Interval: the servers get new weights every N steps. Rollouts in between are up to N steps off policy.

A snapshot has all changes since the previous one, so skipping steps makes the sum of the deltas smaller.

python examples/weight_syncer/interval.py --every 4 --model_name_or_path MODEL --bucket hf://buckets/ME/rl/run \
    --servers http://localhost:8000
"""

from training import arguments, make_syncer, start

if __name__ == "__main__":
    args, config = arguments()
    training = start(args.model_name_or_path)
    with make_syncer(training, config) as syncer:
        syncer.wait_for_hotload_ready()
        for step in range(1, args.steps + 1):
            training.step()
            if step % args.every == 0:
                print("serving", syncer.save_and_hotload(f"step-{step}"), flush=True)
