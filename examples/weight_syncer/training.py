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

"""Common part of the three loops in this directory: arguments, and a small training.

It stands for your own training: next-token prediction of random text. The examples show when weights are saved and when
they are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from transformers import AutoModelForCausalLM
from trl import TrlParser

from hubsync import SyncConfig, WeightSyncer
from hubsync.replicas.deployment import Deployment


@dataclass
class TrainingArguments:
    """Arguments of the three loops."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint that the servers were started with."})
    steps: int = field(default=8, metadata={"help": "Number of optimizer steps."})
    every: int = field(default=4, metadata={"help": "Steps between two hot-loads, of `interval.py`."})


def arguments() -> tuple[TrainingArguments, SyncConfig]:
    """Of the command line: `SyncConfig` has `--bucket` and `--servers`. Servers may also follow the bucket."""
    return TrlParser((TrainingArguments, SyncConfig)).parse_args_and_config()


@dataclass
class Training:
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    def step(self) -> None:
        tokens = torch.randint(0, self.model.config.vocab_size, (2, 32))
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def start(model: str) -> Training:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return Training(loaded, torch.optim.AdamW(loaded.parameters(), lr=1e-5))


def make_syncer(training: Training, config: SyncConfig) -> WeightSyncer:
    deployment = Deployment(config.servers, api_key=config.api_key) if config.servers else None
    # The deployment holds the servers.
    config = replace(config, servers=[])
    return WeightSyncer(training.model, training.optimizer, config, deployment, first_checkpoint_type="delta")
