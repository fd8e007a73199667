"""Rollout loops for the generating process of TRL's asynchronous trainers.

TRL dates a sample by the version that was current when its first request was sent. A server that was restarted, or is
slower than the others of a quorum, may have answered with older weights. These loops request the same tokens from the
vLLM endpoint that also states which weights made which tokens, and record the oldest and newest in every sample.
"""

from __future__ import annotations

from collections import defaultdict
from contextvars import ContextVar
from random import getrandbits
from typing import Any

from trl.experimental.async_distillation import async_rollout_worker as distillation
from trl.experimental.async_grpo import async_rollout_worker as grpo

GENERATE = "/inference/v1/generate"
OLDEST, NEWEST = "weight_sync/version_min", "weight_sync/version_max"  # on samples, and among the trainer's metrics
UNKNOWN = -1  # the server did not state the weights, or they are of no version

HEADERS = "server_headers"  # the server's credentials, among the settings of a loop

_ATTEMPTS = 30  # as TRL's own request

# Versions stated by the current task's requests, in any order.
_made_by: ContextVar[list[int]] = ContextVar("made_by")


class _Authorized:
    """A loop whose requests to its server carry the server's credentials. Teachers of distillation get none."""

    vllm_server_url: str

    def __init__(self, *, server_headers: dict[str, str], **settings: Any):
        self._headers = server_headers
        super().__init__(**settings)

    @property
    def session(self) -> Any:
        return self._session

    @session.setter
    def session(self, session: Any) -> None:  # TRL sets it when its loop starts
        self._session = session and _ServerSession(session, self.vllm_server_url, self._headers)


class _ServerSession:
    """TRL's session of aiohttp, with headers for requests to one server."""

    def __init__(self, session: Any, url: str, headers: dict[str, str]):
        self._session = session
        self._url = url
        self._headers = headers

    def post(self, url: str, **request: Any) -> Any:
        headers = self._headers if url.startswith(f"{self._url}/") else None
        return self._session.post(url, headers=headers, **request)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


class DatedRollouts(_Authorized, grpo._AsyncRolloutLoop):
    """Loop of [`AsyncGRPOTrainer`]. Samples carry the versions of their group, which advantages depend on."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self._versions: defaultdict[int, list[int]] = defaultdict(list)

    async def _generate_one(self, prompt: Any, tool_dict: Any, tools: Any, group_id: int = 0) -> Any:
        _made_by.set(self._versions[group_id])  # per task: each conversation runs in one
        return await super()._generate_one(prompt, tool_dict=tool_dict, tools=tools, group_id=group_id)

    async def _generate_one_turn(self, prompt_ids: list[int]) -> tuple[list[int], list[float]]:
        request = generate_request(self, prompt_ids)
        answer = await self._retry(
            lambda: self._post(GENERATE, request, self.request_timeout), max_attempts=_ATTEMPTS, label=GENERATE
        )
        choice = answer["choices"][0]
        _made_by.get().extend(versions_of(choice))
        return choice["token_ids"], [token["logprob"] for token in choice["logprobs"]["content"]]

    async def _score_group(self, group: Any) -> list[Any]:
        versions = self._versions.pop(group.group_id, None) or [UNKNOWN]
        samples = await super()._score_group(group)
        for sample in samples:
            _stamp(sample, versions)
        return samples


class DatedDistillation(_Authorized, distillation._AsyncRolloutLoop):
    """Loop of [`AsyncDistillationTrainer`]. Samples carry the versions of the student that made them."""

    async def _generate_and_score_one(self, prompt_id: int, row: dict[str, Any]) -> Any:
        versions: list[int] = []
        _made_by.set(versions)  # per task: each sample runs in one
        sample = await super()._generate_and_score_one(prompt_id, row)
        _stamp(sample, versions or [UNKNOWN])
        return sample

    async def _generate_one_turn(self, prompt_ids: list[int]) -> list[int]:
        request = generate_request(self, prompt_ids)
        answer = await self._retry(
            lambda: self._post(self.vllm_server_url, GENERATE, request, self.request_timeout),
            max_attempts=_ATTEMPTS,
            label=GENERATE,
        )
        choice = answer["choices"][0]
        _made_by.get().extend(versions_of(choice))
        token_ids: list[int] = choice["token_ids"]
        return token_ids


def distill(*arguments: Any) -> None:
    """Main function of the generating process of [`AsyncDistillationTrainer`], with the loop above."""
    distillation._AsyncRolloutLoop = DatedDistillation  # type: ignore[misc, assignment]
    distillation._child_main(*arguments)


def _stamp(sample: Any, versions: list[int]) -> None:
    sample.metrics[OLDEST] = float(min(versions))
    sample.metrics[NEWEST] = float(max(versions))


def generate_request(loop: Any, prompt_ids: list[int]) -> dict[str, Any]:
    """TRL's request to `/v1/completions`, converted for `/inference/v1/generate`."""
    sampling = {
        "max_tokens": loop.max_tokens,
        "temperature": loop.temperature,
        "top_p": loop.top_p,
        "top_k": loop.top_k,
        "repetition_penalty": loop.repetition_penalty,
        "logprobs": 0,
        "seed": getrandbits(63),  # otherwise data parallel engines would sample the same text
    }
    if loop.min_p is not None:
        sampling["min_p"] = loop.min_p
    return {"model": loop.model_name, "token_ids": prompt_ids, "sampling_params": sampling}


def versions_of(choice: dict[str, Any]) -> list[int]:
    """Versions of the weights that made a choice's tokens. `UNKNOWN` for weights of no version of the run."""
    if not choice["token_ids"]:
        return []
    labels = [str(span["version"]) for span in choice.get("weight_versions") or []]
    return [int(label) if label.isdecimal() else UNKNOWN for label in labels] or [UNKNOWN]
