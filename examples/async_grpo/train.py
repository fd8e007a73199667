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
#     "aiohttp",
#     "kernels",
#     "math-verify",
#     "peft",
#     "trackio",
#     "vllm>=0.31",
# ]
#
# [tool.uv.sources]
# hubsync-rl = { path = "../.." }
# ///

"""
Asynchronous GRPO. The inference server generates while its weights are updated through a Hugging Face bucket.

In a clone of hubsync (the PyPI package of that name is another project):

pip install '.[trl]' aiohttp kernels math-verify peft trackio vllm    # on the training host; TRL needs vllm there
pip install '.[vllm]'                                                 # on the inference host

On both hosts: `hf auth login`, with a token that may write to (inference host: read from) the bucket's namespace.

# Inference host

HUBSYNC_BUCKET=hf://buckets/<your-name>/rl/async-1 VLLM_PLUGINS=hubsync \
vllm serve Qwen/Qwen3-0.6B \
    --worker-extension-cls vllm_plugin.DeltaWorkerExtension \
    --enable-scale-out \
    --logprobs-mode processed_logprobs \
    --max-model-len 4096 \
    --host 0.0.0.0 --port 8000

The control endpoints (`VLLM_PLUGINS=hubsync`) can pause the server. Set `VLLM_API_KEY` on both hosts, or allow only the
training host to reach the port.

# Training host

python examples/async_grpo/train.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/DeepMath-103K \
    --bucket hf://buckets/<your-name>/rl/async-1 \
    --vllm_server_base_url http://<inference-host>:8000 \
    --output_dir async-grpo-Qwen3-0.6B-deepmath \
    --learning_rate 1e-6 \
    --max_completion_length 2048 \
    --per_device_train_batch_size 8 \
    --num_generations 8 \
    --max_staleness 4 \
    --max_steps 200 \
    --report_to trackio

With several GPUs: `accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml
examples/async_grpo/train.py ...`, with the same arguments.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from peft import LoraConfig
from trl import ScriptArguments, TrlParser
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from trl.rewards import accuracy_reward

from hubsync import SyncConfig
from hubsync.integrations.trl import HubWeightTransfer


@dataclass
class PolicyArguments:
    """The policy. TRL's `ModelConfig` cannot be used: `AsyncGRPOConfig` has a `dtype` too."""

    model_name_or_path: str = field(metadata={"help": "Model to train; the servers serve the same revision of it."})
    use_peft: bool = field(default=False, metadata={"help": "Train and publish a LoRA adapter."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"], metadata={"help": "Modules to adapt."}
    )

    def peft_config(self) -> LoraConfig | None:
        if not self.use_peft:
            return None
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            target_modules=self.lora_target_modules,
            task_type="CAUSAL_LM",
        )


def main() -> None:
    parser = TrlParser((PolicyArguments, ScriptArguments, AsyncGRPOConfig, SyncConfig))
    policy_args, script_args, training_args, sync_config = parser.parse_args_and_config()

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    transfer = HubWeightTransfer(sync_config)
    trainer = AsyncGRPOTrainer(
        model=policy_args.model_name_or_path,
        reward_funcs=accuracy_reward,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        peft_config=policy_args.peft_config(),
        weight_transfer=transfer,
    )
    # TRL does not pass the policy to the transfer.
    transfer.attach(trainer)
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
