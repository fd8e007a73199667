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
#     "peft",
#     "trackio",
# ]
#
# [tool.uv.sources]
# hubsync-rl = { path = "../.." }
# ///

"""
Supervised fine-tuning while servers follow: SFTTrainer does not generate, so an engine in a callback publishes.

Servers that the trainer cannot reach, or need not know, follow the bucket. Those of `--servers` are brought to the last
version at the end; in between they have each version soon after it is published if they follow too.

# Inference host

HUBSYNC_BUCKET=hf://buckets/<your-name>/rl/sft-1 VLLM_PLUGINS=hubsync \
vllm serve Qwen/Qwen3-0.6B --worker-extension-cls vllm_plugin.DeltaWorkerExtension --port 8000

hubsync follow hf://buckets/<your-name>/rl/sft-1 --server http://127.0.0.1:8000

# Training host

python examples/sft/train.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/Capybara \
    --bucket hf://buckets/<your-name>/rl/sft-1 \
    --publish_every 10 \
    --output_dir sft \
    --learning_rate 2e-5 \
    --max_steps 200

With several GPUs: `accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml examples/sft/train.py ...`.
"""

from dataclasses import dataclass, field
from typing import Any

from datasets import load_dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from hubsync import DeltaWeightTransferEngine, SyncConfig


@dataclass
class PublishArguments:
    """When the weights are published."""

    publish_every: int = field(default=1, metadata={"help": "Optimizer steps between two versions."})


class PublishCallback(TrainerCallback):
    """Publishes the weights after every n-th optimizer step. Uploads run while training goes on."""

    def __init__(self, config: SyncConfig, every: int):
        self.config = config
        self.every = every

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self.engine = DeltaWeightTransferEngine(model, optimizer, self.config)  # on every rank

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.engine.publish(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.engine.sync(state.global_step)  # the last version is durable, and committed on `servers`
        self.engine.close()


def main() -> None:
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, SyncConfig, PublishArguments))
    script_args, training_args, model_args, sync_config, publish_args = parser.parse_args_and_config()

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        peft_config=get_peft_config(model_args),
        callbacks=[PublishCallback(sync_config, publish_args.publish_every)],
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
