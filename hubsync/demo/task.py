"""The demo's task: a tiny Qwen3 that adds digits, and answers in the required format about half of the time.

The starting policy is made here in seconds: a word-level tokenizer, random weights, and a short supervised warm start
on sums of digits, answered in two styles. It resembles a model before the "format" phase of a reasoning recipe: it
knows the sums, but does not follow the format. The reward is 1 for `<answer> 7 </answer>` with the right number and 0
for anything else, so reinforcement learning improves the policy at an ordinary learning rate.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

LARGEST = 9
PAD, EOS = "<pad>", "<eos>"
WORDS = [PAD, EOS, "+", "=", "<answer>", "</answer>", "it", "is", "."]

# Tokens. The rewarded completion, `<answer> 7 </answer> <eos>`, has 4; `it is 7 . <eos>` has 5.
MAX_COMPLETION_LENGTH = 6


def problems() -> list[tuple[str, int]]:
    """(prompt, sum) for every pair of digits whose sum is a digit: `3 + 4 =`, 7."""
    pairs = itertools.product(range(LARGEST + 1), repeat=2)
    return [(f"{a} + {b} =", a + b) for a, b in pairs if a + b <= LARGEST]


def prompts(count: int, seed: int = 0) -> Dataset:
    """`count` rows of `prompt` and `answer`, drawn with replacement."""
    table = problems()
    picks = torch.randint(len(table), (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({"prompt": [table[i][0] for i in picks], "answer": [table[i][1] for i in picks]})


def tagged_answer(completions: list[str], answer: list[int], **_: Any) -> list[float | None]:
    """The reward: 1 where the completion is the right number between the tags, 0 elsewhere."""
    return [
        float(text.strip() == f"<answer> {right} </answer>") for text, right in zip(completions, answer, strict=True)
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of `WORDS` and the digits."""
    words = WORDS + [str(number) for number in range(LARGEST + 1)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS)


def make_checkpoint(directory: Path, *, seed: int = 0) -> Path:
    """Write the starting policy (bf16, about 5 million parameters) with its tokenizer to `directory`."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = Qwen3ForCausalLM(_config(tokenizer))
    _warm_start(model, tokenizer)
    model.bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _warm_start(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int = 60, batch: int = 40) -> None:
    """Train on the sums in both styles, just long enough to learn them."""
    texts = [f"{prompt} <answer> {total} </answer> {EOS}" for prompt, total in problems()]
    texts += [f"{prompt} it is {total} . {EOS}" for prompt, total in problems()]
    rows = tokenizer(texts, padding=True, return_tensors="pt")
    labels = rows.input_ids.masked_fill(rows.input_ids == tokenizer.pad_token_id, -100)
    labels[:, :4] = -100  # no loss on the prompt
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        pick = torch.randint(len(texts), (batch,))
        loss = model(rows.input_ids[pick], attention_mask=rows.attention_mask[pick], labels=labels[pick]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
