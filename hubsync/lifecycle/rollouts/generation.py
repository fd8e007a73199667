"""Asynchronous client of one vLLM server's generation endpoints: completions with the versions that made them.

A server with `--enable-scale-out` reports which version sampled which token. For other servers the workers' status is
read before and after a request, and gives bounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import httpx

from hubsync.apply.protocol import MIN_VERSION_HEADER, VERSION_HEADER, WorkerMethod, control_path
from hubsync.errors import ConfigError, ReplicaBehind, ReplicaRefused, ReplicaUnreachable, ReplicaUnsuitable
from hubsync.replicas.http_client import API_KEY_VARIABLE, LIMITS, access_to, trusts_environment
from hubsync.replicas.vllm_http import CONTROL_HINT

Prompt: TypeAlias = str | Sequence[int]


@dataclass(frozen=True)
class Wanted:
    """Which versions may make the tokens of a sample: exactly one, or one and newer. None: any."""

    version: int | None = None
    min_version: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """A server with hubsync's endpoints refuses a request with these that it cannot fulfil."""
        named = {VERSION_HEADER: self.version, MIN_VERSION_HEADER: self.min_version}
        return {name: str(version) for name, version in named.items() if version is not None}

    def allows(self, oldest: int, newest: int) -> bool:
        exact = self.version is None or oldest == newest == self.version
        return exact and (self.min_version is None or oldest >= self.min_version)


ANY = Wanted()

_CONNECT_S = 10.0
_PROBE_S = 30.0  # a server that is busy takes seconds to answer, one that hangs never does


@dataclass(frozen=True)
class Span:
    """Output tokens `start <= i < end` were sampled under weights of `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt.

    Attributes:
        token_ids: the sampled tokens.
        text: their text; None if the prompt was token ids.
        logprobs: log-probability of each sampled token; None if not asked for.
        finish_reason: "stop", "length", ...
        min_version: no token was sampled under an older version.
        max_version: no token was sampled under a newer version.
        spans: which tokens under which version, in order. Empty if the server does not report it: the two bounds are
            then what it served before and after the request.
    """

    token_ids: tuple[int, ...]
    text: str | None
    logprobs: tuple[float, ...] | None
    finish_reason: str
    min_version: int
    max_version: int
    spans: tuple[Span, ...]


class GenerationClient:
    """One vLLM server.

    Args:
        url: base URL.
        api_key: the server's `--api-key`, or the token of the proxy in front of it; default is `VLLM_API_KEY` of the
            environment.
        timeout: seconds that one continuation may take.

    Raises, from every method:
        ReplicaUnreachable: no usable answer. The server may be down, restarting or failing.
        ReplicaUnsuitable: the server cannot report versions.
        ReplicaRefused: the request is invalid.
        ReplicaBehind: see `generate`.
        ConfigError: the API key is wrong.
    """

    def __init__(self, url: str, api_key: str | None = None, *, timeout: float):
        self._access = access_to(url, api_key)
        self.url = self._access.url
        self._timeout = timeout
        self._scale_out = True  # until it says otherwise
        self._reports_spans = False  # until it has
        self._development = False  # until vLLM's development endpoints have answered in place of hubsync's
        self._http = httpx.AsyncClient(
            headers=self._access.headers, limits=LIMITS, trust_env=trusts_environment(self.url)
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def check_health(self) -> None:
        await self._send("GET", "/health", _PROBE_S)

    async def metrics(self) -> str:
        return (await self._send("GET", "/metrics", _PROBE_S)).text

    async def versions(self) -> tuple[int, int]:
        """The lowest and the highest version that any worker serves now."""
        try:
            ranks = await self._statuses()
        except _NoSuchPath:
            raise ReplicaUnsuitable(
                f"{self.url} does not report versions: start it with --enable-scale-out, or {CONTROL_HINT}"
            ) from None
        try:
            versions = [int(rank["version"]) for rank in ranks or ()]
            return min(versions), max(versions)
        except (KeyError, TypeError, ValueError):
            raise ReplicaUnsuitable(f"{self.url} does not follow a run (yet): attach it before sampling") from None

    async def _statuses(self) -> Any:
        """Of the workers: from hubsync's own endpoint, else from vLLM's development endpoint."""
        if not self._development:
            try:
                return (await self._post(control_path(WorkerMethod.STATUS), {}, _PROBE_S)).get("results")
            except _NoSuchPath:
                pass
        body = {"method": WorkerMethod.STATUS, "args": [], "timeout": _PROBE_S}
        try:
            ranks = (await self._post("/collective_rpc", body, _PROBE_S)).get("results")
        except _NoSuchPath:
            self._development = False
            raise
        self._development = True
        return ranks

    async def generate(
        self, prompt: Prompt, sampling: Mapping[str, Any], *, logprobs: bool, wanted: Wanted = ANY
    ) -> Completion:
        """A continuation of `prompt`, text or token ids, with vLLM's sampling parameters.

        ReplicaBehind if the server serves another version than is wanted, or has left it meanwhile.
        """
        before = None if self._reports_spans else await self._versions_if_known()
        options = {**sampling, **({"logprobs": 0} if logprobs else {})}  # 0: of the sampled token alone
        choice = await self._choice(prompt, options, wanted.headers)
        if choice.get("finish_reason") == "abort":
            raise ReplicaUnreachable(f"{self.url} aborted the request")
        self._reports_spans = bool(choice.get("weight_versions"))
        try:
            spans = tuple(_span(span) for span in choice.get("weight_versions") or ())
            versions = [span.version for span in spans] or await self._versions_around(before)
            if not wanted.allows(min(versions), max(versions)):
                raise ReplicaBehind(f"{self.url} served versions {min(versions)} to {max(versions)} meanwhile")
            return Completion(
                token_ids=tuple(map(int, choice["token_ids"])),
                text=choice["text"] if isinstance(prompt, str) else None,
                logprobs=_logprobs(choice["logprobs"]) if logprobs else None,
                finish_reason=choice["finish_reason"],
                min_version=min(versions),
                max_version=max(versions),
                spans=spans,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ReplicaUnsuitable(f"{self.url} does not answer as vLLM does: {error!r} in {choice!r:.200}") from None

    async def _versions_if_known(self) -> tuple[int, int] | None:
        try:
            return await self.versions()
        except ReplicaUnsuitable:
            return None

    async def _versions_around(self, before: tuple[int, int] | None) -> list[int]:
        """Versions that may have been served since `before` was read. Call it right after an answer."""
        after = await self.versions()
        if before is None:
            raise ReplicaUnreachable(f"{self.url} no longer reports which versions made an answer")
        return [*before, *after]

    async def _choice(self, prompt: Prompt, options: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
        """The one choice of the server's answer."""
        if self._scale_out:
            try:
                return await self._generate(prompt, options, headers)
            except _NoSuchPath:
                self._scale_out = False
        body = {"prompt": prompt if isinstance(prompt, str) else list(prompt), "return_token_ids": True, **options}
        return _only_choice(self.url, await self._post("/v1/completions", body, self._timeout, headers))

    async def _generate(self, prompt: Prompt, options: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
        body: dict[str, Any] = {"token_ids": prompt, "sampling_params": options}
        if isinstance(prompt, str):
            tokenized = await self._post("/tokenize", {"prompt": prompt}, self._timeout)
            body |= {"token_ids": tokenized.get("tokens"), "output_mode": "text"}
        else:
            body["token_ids"] = list(prompt)
        return _only_choice(self.url, await self._post("/inference/v1/generate", body, self._timeout, headers))

    async def _post(
        self, path: str, body: Mapping[str, Any], timeout: float, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        answer = await self._send("POST", path, timeout, json=body, headers=headers)
        try:
            document = answer.json()
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise ReplicaUnsuitable(f"{self.url}{path} does not answer as vLLM does: {self._text(answer)}")
        return document

    async def _send(self, verb: str, path: str, timeout: float, **request: Any) -> httpx.Response:
        limits = httpx.Timeout(timeout, connect=min(timeout, _CONNECT_S))
        try:
            answer = await self._http.request(verb, self.url + path, timeout=limits, **request)
        except httpx.TimeoutException:
            raise ReplicaUnreachable(f"{self.url}{path} gave no answer in {timeout:g} s") from None
        except httpx.RequestError as error:
            raise ReplicaUnreachable(f"cannot reach {self.url}{path}: {error or type(error).__name__}") from None
        if answer.status_code == 401:
            wanted = "another API key" if self._access.headers else "an API key"
            raise ConfigError(
                f"{self.url} wants {wanted}: give the sampler its --api-key, or the token of the proxy in front of it, "
                f"as api_key, or set {API_KEY_VARIABLE}"
            )
        if answer.status_code in (403, 404):  # newer versions forbid endpoints that were not enabled
            raise _NoSuchPath(f"{self.url} has no {path} ({answer.status_code}: {self._text(answer)})")
        if answer.status_code == 409 and request.get("headers"):
            raise ReplicaBehind(f"{self.url}: {self._text(answer)}")
        if answer.status_code == 429 or answer.status_code >= 500:
            raise ReplicaUnreachable(f"{self.url}{path} answered {answer.status_code}: {self._text(answer)}")
        if not answer.is_success:
            raise ReplicaRefused(f"{self.url}{path} answered {answer.status_code}: {self._text(answer)}")
        return answer

    def _text(self, answer: httpx.Response) -> str:
        """What a response says, shortened."""
        return self._access.hide(answer.text)[:300]


class _NoSuchPath(ReplicaUnsuitable):
    """The server lacks the endpoint, or it is switched off."""


def _only_choice(url: str, answer: dict[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ReplicaUnsuitable(f"{url} does not answer with one choice, as vLLM does: {answer!r:.200}")
    return choices[0]


def _span(span: Mapping[str, Any]) -> Span:
    return Span(int(span["version"]), int(span["start"]), int(span["end"]))


def _logprobs(logprobs: Mapping[str, Any]) -> tuple[float, ...]:
    """Of the sampled tokens, in any of the shapes that vLLM's endpoints have for them."""
    if "token_logprobs" in logprobs:
        return tuple(map(float, logprobs["token_logprobs"]))
    return tuple(float(token["logprob"]) for token in logprobs["content"])
