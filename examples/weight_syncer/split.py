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

"""Split: every step is saved. A step is hot-loaded later, here after an evaluation of it that the servers do not see.

A snapshot that is only saved costs the servers nothing. Any saved snapshot can be loaded later, also an older one.

python examples/weight_syncer/split.py --model_name_or_path MODEL --bucket hf://buckets/ME/rl/run \
    --servers http://localhost:8000
"""

from training import arguments, make_syncer, start

if __name__ == "__main__":
    args, config = arguments()
    training = start(args.model_name_or_path)
    good = []
    with make_syncer(training, config) as syncer:
        syncer.wait_for_hotload_ready()
        for step in range(args.steps):
            training.step()
            name = syncer.save_only(f"step-{step}")
            if name is not None and step % 2 == 0:  # your evaluation here
                good.append(name)
                print("serving", name, syncer.hotload(name), flush=True)
        print("back at", good[0], syncer.hotload(good[0]), flush=True)
