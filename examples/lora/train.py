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
#     "trackio",
# ]
#
# [tool.uv.sources]
# hubsync-rl = { path = "../.." }
# ///

"""
GRPO of a LoRA adapter. The server loads the base model; every step publishes the adapter.

In a clone of hubsync (the PyPI package of that name is another project):

pip install '.[trl]' peft math-verify          # on the training host
pip install '.[vllm]'                          # on the inference host

# Inference host

HUBSYNC_BUCKET=hf://buckets/<your-name>/rl/lora-1 VLLM_PLUGINS=hubsync VLLM_ALLOW_RUNTIME_LORA_UPDATING=True \
vllm serve Qwen/Qwen3-0.6B --worker-extension-cls vllm_plugin.DeltaWorkerExtension \
    --enable-lora --max-lora-rank 16 --logprobs-mode processed_logprobs --port 8000

# Training host

python examples/lora/train.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --use_peft --lora_r 16 --lora_alpha 32 --lora_target_modules q_proj k_proj v_proj o_proj \
    --dataset_name trl-lib/DeepMath-103K \
    --bucket hf://buckets/<your-name>/rl/lora-1 \
    --vllm_server_base_url http://<inference-host>:8000 \
    --output_dir lora-grpo \
    --learning_rate 1e-5 \
    --max_steps 200
"""

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config
from trl.rewards import accuracy_reward

from hubsync import SyncConfig
from hubsync.integrations.trl import HubSyncCallback


def main() -> None:
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig, SyncConfig))
    script_args, training_args, model_args, sync_config = parser.parse_args_and_config()

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=accuracy_reward,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        peft_config=get_peft_config(model_args),  # None without --use_peft: then the whole model is trained
    )
    # From here on the trainer generates with the server's adapter, which follows every optimizer step.
    HubSyncCallback(trainer, sync_config)
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
