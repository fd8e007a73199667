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
GRPO of a LoRA adapter: the server has the base model, and every step sends it the adapter.

In a clone of hubsync (the PyPI package of that name is another project):

pip install '.[trl]' peft math-verify          # on the training host
pip install '.[vllm]'                          # on the inference host

# Inference host

HUBSYNC_BUCKET=hf://buckets/<your-name>/rl/lora-1 VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=True \
vllm serve Qwen/Qwen3-0.6B --worker-extension-cls vllm_plugin.DeltaWorkerExtension \
    --enable-lora --max-lora-rank 16 --logprobs-mode processed_logprobs --port 8000

# Training host

python examples/lora/train.py hf://buckets/<your-name>/rl/lora-1 http://<inference-host>:8000
"""

import sys

from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import accuracy_reward

from hubsync import SyncConfig
from hubsync.integrations.trl import HubSyncCallback

if __name__ == "__main__":
    bucket, server = sys.argv[1:]
    trainer = GRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=GRPOConfig(output_dir="lora-grpo", vllm_server_base_url=server, learning_rate=1e-5, max_steps=200),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    )
    HubSyncCallback(trainer, SyncConfig(bucket=bucket))
    trainer.train()
