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
GRPO with trainer and inference server on different hosts, which share only a Hugging Face bucket.

In a clone of hubsync (the PyPI package of that name is another project):

pip install '.[trl]' math-verify peft trackio  # on the training host
pip install '.[vllm]'                          # on the inference host

On both hosts: `hf auth login`, with a token that may write to (inference host: read from) the bucket's namespace.

# Inference host

HUBSYNC_BUCKET=hf://buckets/<your-name>/rl/deepmath-1 VLLM_PLUGINS=hubsync \
vllm serve Qwen/Qwen3-0.6B \
    --worker-extension-cls vllm_plugin.DeltaWorkerExtension \
    --logprobs-mode processed_logprobs \
    --max-model-len 4096 \
    --host 0.0.0.0 --port 8000

The control endpoints (`VLLM_PLUGINS=hubsync`) can pause the server. Set `VLLM_API_KEY` on both hosts, or allow only the
training host to reach the port.

# Training host

python examples/grpo_disaggregated/train.py \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/DeepMath-103K \
    --bucket hf://buckets/<your-name>/rl/deepmath-1 \
    --vllm_server_base_url http://<inference-host>:8000 \
    --output_dir grpo-Qwen3-0.6B-deepmath \
    --learning_rate 1e-6 \
    --max_completion_length 2048 \
    --per_device_train_batch_size 8 \
    --num_generations 8 \
    --gradient_accumulation_steps 8 \
    --logging_steps 1 \
    --report_to trackio

With several GPUs: `accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml
examples/grpo_disaggregated/train.py ...`, the rest the same; `multi_gpu.yaml` and `zero3.yaml` lie beside it.
"""

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config
from trl.rewards import accuracy_reward

from hubsync import SyncConfig
from hubsync.integrations.trl import HubSyncCallback


def main() -> None:
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig, SyncConfig))
    script_args, training_args, model_args, sync_config = parser.parse_args_and_config()

    # float32 parameters (TRL's default) with bfloat16 autocast: parameters in bfloat16 would lose most small updates.
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
    }
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)

    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=accuracy_reward,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        peft_config=get_peft_config(model_args),  # None without --use_peft
    )
    # From here on the trainer generates on the vLLM server, whose weights follow every optimizer step.
    HubSyncCallback(trainer, sync_config)
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
