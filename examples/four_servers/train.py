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
#     "math-verify",
#     "trackio",
# ]
#
# [tool.uv.sources]
# hubsync-rl = { path = "../.." }
# ///

"""
GRPO whose completions come from four servers.

`GRPOTrainer` generates on one address. Here its `rollout_func` draws every completion from all servers instead: a
request goes to the server with the smallest load, and one of a dead server goes to another. The callback brings all
servers to each version before the next completions; with `--quorum 3`, training goes on without a fourth, and takes no
completions of older weights from it.

# Four inference hosts, each

HUBSYNC_BUCKET=hf://buckets/<your-name>/rl/four-1 VLLM_PLUGINS=hubsync VLLM_API_KEY=... \
vllm serve Qwen/Qwen3-0.6B --worker-extension-cls vllm_plugin.DeltaWorkerExtension \
    --enable-scale-out --logprobs-mode processed_logprobs --host 0.0.0.0 --port 8000

# Training host

VLLM_API_KEY=... python examples/four_servers/train.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/DeepMath-103K \
    --bucket hf://buckets/<your-name>/rl/four-1 \
    --servers http://<a>:8000 http://<b>:8000 http://<c>:8000 http://<d>:8000 --quorum 3 \
    --vllm_server_base_url http://<a>:8000 \
    --output_dir four-servers \
    --learning_rate 1e-6 \
    --max_completion_length 2048 \
    --per_device_train_batch_size 8 \
    --num_generations 8 \
    --gradient_accumulation_steps 8

The server of `--vllm_server_base_url` is always waited for; the quorum is of all four.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ScriptArguments, TrlParser
from trl.rewards import accuracy_reward

from hubsync import SyncConfig
from hubsync.integrations.trl import HubSyncCallback
from hubsync.lifecycle.rollouts.sampler import Sample, Sampler

T = TypeVar("T")


@dataclass
class PolicyArguments:
    """The policy: a whole model. The sampler draws from the served model, never from an adapter."""

    model_name_or_path: str = field(metadata={"help": "Model to train; the servers serve the same revision of it."})


class Rollouts:
    """TRL's `rollout_func`: one completion for each prompt, from whichever server is free.

    The sampler runs in a thread, so that it knows the state of all servers when completions are wanted.
    """

    def __init__(self, config: SyncConfig):
        self.callback: HubSyncCallback | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._sampler = Sampler(config.servers, api_key=config.api_key)
        self._run(self._sampler.__aenter__())

    def close(self) -> None:
        self._run(self._sampler.close())

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def __call__(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        ids = [self._tokens(prompt, trainer) for prompt in prompts]
        samples = self._run(self._draw(ids, trainer.args))
        made = Counter(sample.replica for sample in samples)
        print(" ".join(f"{url}: {count}" for url, count in sorted(made.items())), flush=True)
        return {
            "prompt_ids": ids,
            "completion_ids": [list(sample.token_ids) for sample in samples],
            "logprobs": [list(sample.logprobs or ()) for sample in samples],
        }

    def _tokens(self, prompt: Any, trainer: GRPOTrainer) -> list[int]:
        tokenizer = trainer.processing_class
        if isinstance(prompt, str):
            return tokenizer(prompt)["input_ids"]
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]

    async def _draw(self, ids: list[list[int]], args: GRPOConfig) -> list[Sample]:
        """In the order of the prompts: TRL repeats a prompt for each of its generations."""
        assert self.callback is not None
        # The version that this step has just committed. A server that a quorum went on without is not asked before it
        # serves that too.
        engine = self.callback.engine
        wanted = {} if engine is None else {"min_version": engine.position.version}
        sampling = {
            "max_tokens": args.max_completion_length,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": args.top_k or -1,
        }
        drawn = self._sampler.sample(ids, 1, ordered=True, logprobs=True, **wanted, **sampling)
        return [sample async for sample in drawn]


def main() -> None:
    parser = TrlParser((ScriptArguments, GRPOConfig, PolicyArguments, SyncConfig))
    script_args, training_args, policy_args, sync_config = parser.parse_args_and_config()

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    rollouts = Rollouts(sync_config)
    trainer = GRPOTrainer(
        model=policy_args.model_name_or_path,
        reward_funcs=accuracy_reward,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        rollout_func=rollouts,
    )
    rollouts.callback = HubSyncCallback(trainer, sync_config)
    trainer.train()
    rollouts.close()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
