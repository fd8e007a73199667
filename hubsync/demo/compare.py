"""Greedy tokens and log-probabilities of a vLLM server, to compare two servers exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from hubsync.replicas.http_client import access_to, new_client

MAX_TOKENS = 32


@dataclass(frozen=True)
class Greedy:
    """One greedy continuation.

    Attributes:
        tokens: token ids, as text.
        logprobs: for each token, ids and log-probabilities of the two most probable ones, sorted by id.
    """

    tokens: tuple[str, ...]
    logprobs: tuple[tuple[tuple[str, float], ...], ...]


def greedy(url: str, prompts: Sequence[str]) -> list[Greedy]:
    """Greedy continuation of each prompt. Requests are sequential, because batching may change results."""
    with new_client(access_to(url)) as client:
        client.headers["Connection"] = "close"  # a starved server may close a kept connection under a request
        model = client.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
        return [_greedy(client, url, model, prompt) for prompt in prompts]


def _greedy(client: httpx.Client, url: str, model: str, prompt: str) -> Greedy:
    request = {
        "model": model,
        "prompt": prompt,
        "temperature": 0.0,
        "max_tokens": MAX_TOKENS,
        "ignore_eos": True,
        "logprobs": 2,
        "return_tokens_as_token_ids": True,  # different tokens may have the same text
    }
    answer = client.post(f"{url}/v1/completions", json=request, timeout=120)
    answer.raise_for_status()
    logprobs = answer.json()["choices"][0]["logprobs"]
    return Greedy(
        tokens=tuple(logprobs["tokens"]),
        logprobs=tuple(tuple(sorted(position.items())) for position in logprobs["top_logprobs"]),
    )
