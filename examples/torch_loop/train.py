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

"""
Reinforcement learning in a plain torch loop, without TRL and accelerate. A vLLM server generates the completions with
the weights of the previous step.

In a clone of hubsync: `pip install . transformers` on the training host, `pip install '.[vllm]'` on the inference host,
and `hf auth login` on both.

# Inference host

HUBSYNC_BUCKET=hf://buckets/<your-name>/rl/loop-1 VLLM_SERVER_DEV_MODE=1 \
vllm serve Qwen/Qwen3-0.6B --worker-extension-cls vllm_plugin.DeltaWorkerExtension --port 8000

# Training host

python examples/torch_loop/train.py Qwen/Qwen3-0.6B hf://buckets/<your-name>/rl/loop-1 http://<inference-host>:8000 100
"""

import argparse

import httpx
import torch
from transformers import AutoModelForCausalLM

from hubsync import DeltaWeightTransferEngine, SyncConfig

# The loss assumes samples of the whole distribution. All have one length, so that no padding is needed.
SAMPLING = {"n": 8, "max_tokens": 32, "ignore_eos": True, "temperature": 1.0, "top_p": 1.0, "top_k": -1}


def rollouts(server: str, prompt: str) -> tuple[torch.Tensor, int]:
    """Tokens of the prompt and its completions, int64[8, length], and the number of prompt tokens."""
    request = {"prompt": prompt, "return_token_ids": True, **SAMPLING}
    choices = httpx.post(f"{server}/v1/completions", json=request, timeout=600).json()["choices"]
    tokens = torch.tensor([choice["prompt_token_ids"] + choice["token_ids"] for choice in choices])
    return tokens, len(choices[0]["prompt_token_ids"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a model in a plain torch loop. A vLLM server generates.")
    parser.add_argument("model", help="model to train; the server serves the same revision of it")
    parser.add_argument("bucket", help="hf://buckets/NAMESPACE/NAME/RUN, or a directory")
    parser.add_argument("server", help="URL of the vLLM server, such as http://10.0.0.7:8000")
    parser.add_argument("steps", type=int, help="number of optimizer steps")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)  # published and served in bfloat16
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=args.bucket, servers=[args.server])) as engine:
        engine.sync(step=0)  # the server finds its version, or is brought to this one
        for step in range(1, args.steps + 1):
            tokens, start = rollouts(args.server, "My favourite words are")
            rewards = torch.tensor(
                [len(row.unique()) / len(row) for row in tokens]
            )  # rewards distinct tokens: put your reward here
            logprobs = model(tokens.to(model.device)).logits[:, start - 1 : -1].log_softmax(-1)
            chosen = logprobs.gather(-1, tokens[:, start:, None].to(model.device)).mean((1, 2))
            loss = -((rewards - rewards.mean()).to(model.device) * chosen).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done = engine.sync(step).published  # the next completions come from these weights
            print(f"step {step} reward {rewards.mean():.3f} version {done.version} changed {done.changed}", flush=True)
