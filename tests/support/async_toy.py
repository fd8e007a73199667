"""TRL's asynchronous trainers on a CPU: what has to stand in for a GPU, and a policy small enough for it.

Stands in:
* for the attention kernel (FlashAttention 3, fetched from the Hub): `tree_attention` below computes the same in plain
  torch, segment by segment of TRL's prefix tree;
* for the probe of the GPU's peak FLOPS, which asks CUDA for its name: there is none, and no utilisation is logged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from hubsync.publish.detect.snapshot import Snapshot
from hubsync.publish.view.live import published_tensors, table_of

from .models import save_checkpoint, save_tokenizer

GENERATIONS = 4


def tree_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    tree_kv_index: torch.Tensor,
    tree_cu_seqlens_q: torch.Tensor,
    tree_cu_seqlens_k: torch.Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Each segment attends to its path from the root; queries are the last tokens of that path."""
    q_bounds, k_bounds = tree_cu_seqlens_q.tolist(), tree_cu_seqlens_k.tolist()
    groups, outputs = query.shape[1] // key.shape[1], []
    for segment in range(len(q_bounds) - 1):
        path = tree_kv_index[k_bounds[segment] : k_bounds[segment + 1]]
        q = query[:, :, q_bounds[segment] : q_bounds[segment + 1]]
        k, v = (side[:, :, path].repeat_interleave(groups, 1) for side in (key, value))
        behind = len(path) - q.shape[2]
        seen = torch.ones(q.shape[2], len(path), dtype=torch.bool).tril(behind)
        outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


@contextmanager
def without_gpu() -> Iterator[None]:
    from trl.experimental.async_distillation import async_distillation_trainer
    from trl.experimental.async_grpo import async_grpo_trainer, packing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_distillation_trainer, "get_peak_flops_per_device", lambda *_: None)
        patch.setattr(packing, "tree_attention", tree_attention)
        patch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)
        yield


def save_policy(directory: Path, architecture: str = "qwen3_tied") -> Path:
    """A tiny Qwen3 with a chat template that TRL can parse answers of."""
    from trl.chat_template_utils import qwen3_chat_template

    save_checkpoint(architecture, directory)
    save_tokenizer(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = qwen3_chat_template
    tokenizer.save_pretrained(directory)
    return directory


def make_trainer(policy: Path, directory: Path, url: str, **arguments: Any) -> Any:
    """An AsyncGRPOTrainer in float32; arguments that its configuration does not know go to the trainer."""
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

    parts = _not_of(AsyncGRPOConfig, arguments)
    return AsyncGRPOTrainer(
        model=str(policy),
        reward_funcs=share_of_vowels,
        args=AsyncGRPOConfig(num_generations=GENERATIONS, **{**settings(directory, url), **arguments}),
        train_dataset=questions(),
        **parts,
    )


def make_distillation_trainer(policy: Path, directory: Path, url: str, **arguments: Any) -> Any:
    """An AsyncDistillationTrainer whose teacher is the student's own server.

    Attention is torch's here, which does not keep apart the samples that share a row.
    """
    from trl.experimental.async_distillation import AsyncDistillationConfig, AsyncDistillationTrainer

    parts = _not_of(AsyncDistillationConfig, arguments)
    return AsyncDistillationTrainer(
        model=str(policy),
        args=AsyncDistillationConfig(
            teacher_server_urls={"default": url},
            model_init_kwargs={"attn_implementation": "sdpa"},
            **settings(directory, url),
            **arguments,
        ),
        train_dataset=questions(),
        **parts,
    )


def _not_of(configuration: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that a configuration does not know; they are taken out."""
    return {name: arguments.pop(name) for name in [*arguments] if not hasattr(configuration, name)}


def settings(directory: Path, url: str) -> dict[str, Any]:
    """What both configurations have in common."""
    return {
        "output_dir": str(directory),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": GENERATIONS,
        "max_completion_length": 100,
        "token_budget": -1,
        "learning_rate": 1e-4,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "vllm_server_base_url": url,
        "heartbeat_stale_after_s": 600.0,
    }


def questions() -> Dataset:
    return Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i} plus 1"}]} for i in range(8)])


def digest_of(model: torch.nn.Module) -> str:
    """Of the published view of a model, computed from its parameters alone."""
    tensors = published_tensors(model)
    return Snapshot(tensors, table_of(tensors, torch.bfloat16)).digest.hex


def share_of_vowels(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """A reward that differs between samples. TRL's process of rollouts imports it by name."""
    texts = [completion[-1]["content"] for completion in completions]
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in texts]
