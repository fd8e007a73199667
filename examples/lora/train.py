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
GRPO of a LoRA adapter. The server loads the base model; every step publishes the adapter.

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

import argparse

from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import accuracy_reward

from hubsync import SyncConfig
from hubsync.integrations.trl import HubSyncCallback

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a LoRA adapter with GRPO. A vLLM server generates.")
    parser.add_argument("bucket", help="hf://buckets/NAMESPACE/NAME/RUN, or a directory")
    parser.add_argument("server", help="URL of the vLLM server, such as http://10.0.0.7:8000")
    args = parser.parse_args()
    trainer = GRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=GRPOConfig(output_dir="lora-grpo", vllm_server_base_url=args.server, learning_rate=1e-5, max_steps=200),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    )
    HubSyncCallback(trainer, SyncConfig(bucket=args.bucket))
    trainer.train()
