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
#     "peft",
#     "pillow",
#     "torchvision",
#     "trackio",
# ]
#
# [tool.uv.sources]
# hubsync-rl = { path = "../.." }
# ///

"""
GRPO of a vision-language model. The server generates from images, with weights that follow every optimizer step.

Vision tower and language model are published alike: every weight that the trainer holds is part of the version.

# Inference host

HUBSYNC_BUCKET=hf://buckets/<your-name>/rl/vlm-1 VLLM_PLUGINS=hubsync \
vllm serve Qwen/Qwen3-VL-2B-Instruct --worker-extension-cls vllm_plugin.DeltaWorkerExtension \
    --enable-scale-out --logprobs-mode processed_logprobs --max-model-len 8192 --port 8000

TRL has the server process the images; from vLLM 0.30 that endpoint needs `--enable-scale-out`.

# Training host

python examples/grpo_vlm/train.py \
    --model_name_or_path Qwen/Qwen3-VL-2B-Instruct \
    --dataset_name lmms-lab/multimodal-open-r1-8k-verified \
    --bucket hf://buckets/<your-name>/rl/vlm-1 \
    --vllm_server_base_url http://<inference-host>:8000 \
    --output_dir grpo-vlm \
    --learning_rate 1e-6 \
    --max_completion_length 1024 \
    --per_device_train_batch_size 8 \
    --num_generations 8

The dataset needs columns `image`, `problem` and `solution`. With `--use_peft`, name modules of the language model only:
vLLM does not adapt vision towers.
"""

from typing import Any

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config
from trl.rewards import accuracy_reward

from hubsync import SyncConfig
from hubsync.integrations.trl import HubSyncCallback

SYSTEM = "Look at the image, think, and put the final answer into \\boxed{}."


def conversation(example: dict[str, Any]) -> dict[str, Any]:
    """TRL puts the image into the user's message."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": example["problem"]}]
    return {"prompt": messages, "solution": example["solution"]}


def main() -> None:
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig, SyncConfig))
    script_args, training_args, model_args, sync_config = parser.parse_args_and_config()

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    train_dataset = dataset[script_args.dataset_train_split].map(conversation)
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=accuracy_reward,
        args=training_args,
        train_dataset=train_dataset,
        peft_config=get_peft_config(model_args),
    )
    HubSyncCallback(trainer, sync_config)
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
