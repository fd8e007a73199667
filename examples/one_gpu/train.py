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
GRPO with trainer and vLLM server on one GPU, in turns: the server sleeps while the trainer trains.

pip install '.[trl,vllm]' math-verify trackio

# The server. It takes a share of the GPU, and gives all of it back while it sleeps.

HUBSYNC_BUCKET=./runs/one-gpu VLLM_PLUGINS=hubsync VLLM_SERVER_DEV_MODE=1 \
vllm serve Qwen/Qwen3-0.6B \
    --worker-extension-cls vllm_plugin.DeltaWorkerExtension \
    --logprobs-mode processed_logprobs \
    --enable-sleep-mode --gpu-memory-utilization 0.4 --max-model-len 4096

`VLLM_SERVER_DEV_MODE` opens `/sleep` and `/wake_up`: keep the port on the loopback interface, which is the default.

# The trainer

python examples/one_gpu/train.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/DeepMath-103K \
    --bucket ./runs/one-gpu \
    --output_dir grpo-one-gpu --learning_rate 1e-6 --max_completion_length 2048 \
    --per_device_train_batch_size 8 --num_generations 8 --gradient_accumulation_steps 8 \
    --logging_steps 1 --report_to trackio

Each step: wake the server, commit the new version there, generate, let it sleep, train. At level 1, the default, its
weights wait in main memory (2 bytes a parameter). At level 2 (`--sleep_level 2`) they are dropped, and rebuilt from the
run at the next turn. The trainer's parameters, gradients and optimizer states stay on the GPU: 16 bytes a parameter
with float32 and AdamW. Every turn logs how much of the GPU is used.
"""

import logging
from dataclasses import dataclass, field

import httpx
import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser
from trl.rewards import accuracy_reward

from hubsync import SyncConfig
from hubsync.integrations.trl import HubSyncCallback

logger = logging.getLogger(__name__)


@dataclass
class TurnsArguments:
    """How the server leaves the GPU to the trainer."""

    sleep_level: int = field(default=1, metadata={"help": "1, 2, or 0: the server stays awake (for CPUs)"})


class TurnsTrainer(GRPOTrainer):
    """The server is awake only while it generates. hubsync commits the newest version at the beginning of that."""

    turns: TurnsArguments

    def _generate(self, prompts, *args, **kwargs):
        self._server("wake_up")
        try:
            return super()._generate(prompts, *args, **kwargs)
        finally:
            self._server("sleep", level=self.turns.sleep_level)

    def _server(self, call: str, **params: int) -> None:
        if self.turns.sleep_level and self.accelerator.is_main_process:
            httpx.post(f"{self.args.vllm_server_base_url}/{call}", params=params, timeout=300).raise_for_status()
        self.accelerator.wait_for_everyone()
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            logger.info("after %s: %.1f of %.1f GB of the GPU are used", call, (total - free) / 1e9, total / 1e9)


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig, SyncConfig, TurnsArguments))
    script_args, training_args, model_args, sync_config, turns = parser.parse_args_and_config()
    training_args.vllm_server_base_url = training_args.vllm_server_base_url or "http://127.0.0.1:8000"
    # float32 parameters (TRL's default) with bfloat16 autocast: parameters in bfloat16 would lose most small updates.
    training_args.model_init_kwargs = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)

    trainer = TurnsTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=accuracy_reward,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
    )
    trainer.turns = turns
    HubSyncCallback(trainer, sync_config)
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
