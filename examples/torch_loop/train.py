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
#     "hubsync-rl",
#     "transformers>=5",
# ]
#
# [tool.uv.sources]
# hubsync-rl = { path = "../.." }
# ///

"""
Reinforcement learning in a plain torch loop, without TRL (and its parser) and accelerate. A vLLM server generates the
completions with the weights of the previous step.

In a clone of hubsync: `pip install . transformers` on the training host, `pip install '.[vllm]'` on the inference host,
and `hf auth login` on both.

# Inference host

HUBSYNC_BUCKET=hf://buckets/<your-name>/rl/loop-1 VLLM_PLUGINS=hubsync \
vllm serve Qwen/Qwen3-0.6B --worker-extension-cls vllm_plugin.DeltaWorkerExtension --port 8000

# Training host

python examples/torch_loop/train.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --bucket hf://buckets/<your-name>/rl/loop-1 \
    --servers http://<inference-host>:8000 \
    --steps 100
"""

import os
from dataclasses import dataclass, field

import httpx
import torch
from transformers import AutoModelForCausalLM, HfArgumentParser

from hubsync import DeltaWeightTransferEngine, SyncConfig

# The loss assumes samples of the whole distribution. All have one length, so that no padding is needed.
SAMPLING = {"n": 8, "max_tokens": 32, "ignore_eos": True, "temperature": 1.0, "top_p": 1.0, "top_k": -1}


@dataclass
class Arguments:
    """Arguments of this script."""

    model_name_or_path: str = field(metadata={"help": "Model to train; the server serves the same revision of it."})
    steps: int = field(default=100, metadata={"help": "Number of optimizer steps."})


def rollouts(server: httpx.Client, prompt: str) -> tuple[torch.Tensor, int]:
    """Tokens of the prompt and its completions, int64[8, length], and the number of prompt tokens."""
    request = {"prompt": prompt, "return_token_ids": True, **SAMPLING}
    answer = server.post("v1/completions", json=request)
    answer.raise_for_status()
    choices = answer.json()["choices"]
    tokens = torch.tensor([choice["prompt_token_ids"] + choice["token_ids"] for choice in choices])
    return tokens, len(choices[0]["prompt_token_ids"])


def main() -> None:
    args, config = HfArgumentParser((Arguments, SyncConfig)).parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)  # served in bfloat16
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    api_key = config.api_key or os.environ.get("VLLM_API_KEY")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else None
    server = httpx.Client(base_url=config.servers[0], headers=headers, timeout=600)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        engine.sync(step=0)  # the server finds its version, or is brought to this one
        for step in range(1, args.steps + 1):
            tokens, start = rollouts(server, "My favourite words are")
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


if __name__ == "__main__":
    main()
