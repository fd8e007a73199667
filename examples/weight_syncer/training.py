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

import argparse
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from hubsync import SyncConfig, WeightSyncer
from hubsync.replicas.deployment import Deployment


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", required=True, help="checkpoint that the servers were started with")
    made.add_argument("--bucket", required=True, help="hf://buckets/NAMESPACE/NAME/RUN, or a directory")
    made.add_argument("--servers", nargs="*", default=[], help="URLs to push to; servers may also follow the bucket")
    made.add_argument("--steps", type=int, default=8)
    return made


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


def make_syncer(args: argparse.Namespace, training: Training) -> WeightSyncer:
    deployment = Deployment(args.servers) if args.servers else None
    config = SyncConfig(bucket=args.bucket, base_model=args.model)
    return WeightSyncer(training.model, training.optimizer, config, deployment, first_checkpoint_type="delta")
