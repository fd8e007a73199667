"""Rollouts from the replicas of a run: K samples per prompt, each with the versions that made it.

    async with Sampler(["http://10.0.0.7:8000", "http://10.0.0.8:8000"]) as sampler:
        async for sample in sampler.sample(prompts, 8, max_tokens=512, temperature=1.0):
            ...

Every sample is one task, which asks one replica after the other until it has an answer. So each sample exists exactly
once, whichever replica dies: late answers to cancelled requests are dropped. A failed replica gets no new requests
until a health check succeeds. If the check fails, its running requests are cancelled.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import NoneType, TracebackType
from typing import Any

from hubsync.errors import ConfigError, ReplicaBehind, ReplicaError, ReplicaRefused, ReplicaUnreachable
from hubsync.replicas.server import checked_seconds, checked_urls

from .generation import GenerationClient, Prompt, Span, Wanted
from .replica import SampleRequest, SamplingReplica, cancel_all
from .window import AdaptiveWindow, RequestLimit

_BEHIND_S = 0.1  # between two rounds over replicas that do not serve the wanted version, growing
_LONGEST_BEHIND_S = 2.0


@dataclass(frozen=True)
class Sample:
    """One rollout.

    Attributes:
        prompt: index of its prompt.
        k: which of the prompt's samples, 0 to K - 1.
        token_ids: the sampled tokens.
        text: their text; None if the prompt was token ids.
        logprobs: log-probability of each sampled token; None if not asked for.
        finish_reason: "stop", "length", ...
        min_version: no token was sampled under an older version.
        max_version: no token was sampled under a newer version.
        spans: which tokens under which version, in order; empty if the replica does not report it.
        replica: URL of the replica that made it.
        seconds: from the request that was answered to its answer.
    """

    prompt: int
    k: int
    token_ids: tuple[int, ...]
    text: str | None
    logprobs: tuple[float, ...] | None
    finish_reason: str
    min_version: int
    max_version: int
    spans: tuple[Span, ...]
    replica: str
    seconds: float


class Sampler:
    """Samples from all replicas of a run; use it within `async with`.

    Args:
        replicas: base URLs of the vLLM servers.
        window: requests that a replica works on at once: a number, or how to adapt it to the replica's load.
        api_key: the servers' `--api-key`, or the token of the proxy in front of them; default is `VLLM_API_KEY` of the
            environment.
        timeout: seconds that one sample may take. Then it is cancelled and requested again.
        attempts: number of failures of one sample after which the error is raised.
        patience: seconds without any usable replica after which an error is raised.
        poll_s: seconds between two health checks of a usable replica.
    """

    def __init__(
        self,
        replicas: Sequence[str],
        *,
        window: int | AdaptiveWindow | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        attempts: int = 10,
        patience: float = 60.0,
        poll_s: float = 1.0,
    ):
        urls = checked_urls(replicas)
        for what, seconds in (("timeout", timeout), ("patience", patience), ("poll_s", poll_s)):
            checked_seconds(what, seconds)
        if not isinstance(attempts, int) or attempts < 1:
            raise ConfigError(f"attempts must be 1 or more, not {attempts!r}")
        settings = AdaptiveWindow.fixed(window) if isinstance(window, int) else window or AdaptiveWindow()
        if not isinstance(settings, AdaptiveWindow):
            raise ConfigError(f"window must be a number of requests or an AdaptiveWindow, not {window!r:.80}")
        self._attempts = attempts
        self._patience = patience
        self._poll_s = poll_s
        self._replicas = [
            SamplingReplica(GenerationClient(url, api_key, timeout=timeout), RequestLimit(settings)) for url in urls
        ]
        self._waiting: deque[_Turn] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._giving_up: asyncio.TimerHandle | None = None
        self._open = self._closed = False

    @property
    def windows(self) -> dict[str, int]:
        """How many requests each replica, by its URL, may work on at once now."""
        return {replica.url: replica.window.size for replica in self._replicas}

    async def __aenter__(self) -> Sampler:
        if self._closed:
            raise ConfigError("this sampler was closed: make a new one")
        self._open = True
        for replica in self._replicas:
            self._start(self._watch(replica))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel all running requests, and close all connections."""
        self._open, self._closed = False, True
        await cancel_all(list(self._tasks))
        if self._giving_up is not None:
            self._giving_up.cancel()
        for replica in self._replicas:
            await replica.client.close()

    async def sample(
        self,
        prompts: Sequence[Prompt],
        k: int,
        *,
        ordered: bool = False,
        logprobs: bool = False,
        version: int | None = None,
        min_version: int | None = None,
        **sampling: Any,
    ) -> AsyncIterator[Sample]:
        """Exactly `k` samples of every prompt. Leaving the loop gives up those that are still to come.

        Args:
            prompts: texts, or token ids.
            ordered: in the order of prompts and k, instead of as they are completed.
            logprobs: also the log-probability of every sampled token.
            version: only samples whose tokens are all of this version.
            min_version: only samples whose tokens are all of this version or newer. Replicas that serve another version
                are asked again later, and samples that a commit has mixed are made again.
            sampling: vLLM's sampling parameters, `max_tokens`, `temperature`, `stop`, ... With a `seed`, every sample
                has a distinct seed, derived from it.

        Raises:
            ReplicaUnreachable: there was no usable replica for `patience` seconds (it says what is wrong with each), or
                one sample failed `attempts` times.
            ReplicaBehind: no replica served the wanted version for `patience` seconds.
            ReplicaRefused: a request is wrong; no replica will take it.
            ConfigError: the API key or an argument is wrong, or the sampler is not open.
        """
        if not self._open:
            raise ConfigError("the sampler is closed: use it within `async with Sampler(...) as sampler`")
        _require_request(prompts, k, sampling)
        wanted = Wanted(version, min_version)
        tasks = [
            self._start(
                self._sample(
                    index, number, SampleRequest(prompt, _seeded(sampling, index * k + number), logprobs, wanted)
                )
            )
            for index, prompt in enumerate(prompts)
            for number in range(k)
        ]
        try:
            async for task in _in_order(tasks) if ordered else _as_completed(tasks):
                if task.cancelled():
                    raise ConfigError("the sampler was closed before all samples were there")
                yield task.result()
        finally:
            await cancel_all(tasks)

    # --- one sample

    async def _sample(self, index: int, k: int, request: SampleRequest) -> Sample:
        failures, behind = 0, _Behind(self._patience)
        while True:
            replica = await self._acquire(again=failures > 0, avoid=behind.replicas)
            started = time.perf_counter()
            try:
                completion = await replica.generate(request)
            except ReplicaRefused:
                raise
            except ReplicaBehind as error:  # healthy, and asked again later
                behind.add(replica.url, error)
                if behind.replicas >= {replica.url for replica in self._replicas if replica.usable}:
                    await behind.wait()
                continue
            except ReplicaError as error:
                failures += 1
                replica.suspect(error)
                if failures == self._attempts:
                    raise ReplicaUnreachable(
                        f"sample {k} of prompt {index} failed {failures} times, at last so: {error}"
                    ) from error
                continue
            finally:
                self._release(replica)
            replica.failures = 0
            return Sample(index, k, **vars(completion), replica=replica.url, seconds=time.perf_counter() - started)

    async def _acquire(self, *, again: bool, avoid: set[str]) -> SamplingReplica:
        """The replica with the smallest used share of its window, once one has capacity. Waiting samples are served in
        order; repeated ones go first. If there are others, it is none of those to avoid."""
        turn = _Turn(asyncio.get_running_loop().create_future(), avoid)
        self._waiting.appendleft(turn) if again else self._waiting.append(turn)
        self._assign()
        self._watch_patience()
        try:
            return await turn.given
        except asyncio.CancelledError:
            if turn.given.done() and not turn.given.cancelled() and turn.given.exception() is None:
                self._release(turn.given.result())
            raise

    def _release(self, replica: SamplingReplica) -> None:
        replica.outstanding -= 1
        self._assign()

    def _assign(self) -> None:
        passed: list[_Turn] = []  # their turn is kept: only replicas that they avoid have capacity
        while self._waiting and any(replica.has_capacity for replica in self._replicas):
            turn = self._waiting.popleft()
            if turn.given.done():  # cancelled
                continue
            replica = self._freest(turn.avoid)
            if replica is None:
                passed.append(turn)
                continue
            replica.outstanding += 1
            replica.window.use(replica.outstanding)
            turn.given.set_result(replica)
        self._waiting.extendleft(reversed(passed))

    def _freest(self, avoid: set[str]) -> SamplingReplica | None:
        """A replica with capacity; one of `avoid` only where no other is usable."""
        usable = [replica for replica in self._replicas if replica.usable]
        chosen = [replica for replica in usable if replica.url not in avoid] or usable
        free = [replica for replica in chosen if replica.has_capacity]
        if not free:
            return None
        least = min(replica.share for replica in free)
        return random.choice([replica for replica in free if replica.share == least])

    # --- health of replicas

    async def _watch(self, replica: SamplingReplica) -> None:
        """Check a replica's health periodically: at once after a failed request, and less often while it is dead."""
        while True:
            try:
                await replica.check()
            except Exception as error:  # also unexpected ones: a replica whose watch ends would never be used again
                replica.die(error)
            else:
                replica.live()
                self._assign()
            self._watch_patience()
            await replica.wait(self._poll_s)

    def _watch_patience(self) -> None:
        if any(replica.usable for replica in self._replicas):
            if self._giving_up is not None:
                self._giving_up.cancel()
            self._giving_up = None
        elif self._giving_up is None:
            self._giving_up = asyncio.get_running_loop().call_later(self._patience, self._give_up)

    def _give_up(self) -> None:
        self._giving_up = None
        if any(replica.usable for replica in self._replicas):
            return
        reasons = "; ".join(str(replica.error or f"{replica.url} has not answered yet") for replica in self._replicas)
        while self._waiting:
            turn = self._waiting.popleft().given
            if not turn.done():
                turn.set_exception(
                    ReplicaUnreachable(f"no replica has been usable for {self._patience:g} s: {reasons}")
                )

    def _start(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


@dataclass
class _Turn:
    """A sample that waits for a replica: the one that it is given, and those to avoid."""

    given: asyncio.Future[SamplingReplica]
    avoid: set[str]


class _Behind:
    """Replicas that did not serve the version that a sample wants, in this round over all of them."""

    def __init__(self, patience: float):
        self.replicas: set[str] = set()
        self._patience = patience
        self._since: float | None = None
        self._pause = _BEHIND_S
        self._error: ReplicaBehind | None = None

    def add(self, url: str, error: ReplicaBehind) -> None:
        self.replicas.add(url)
        self._since = time.monotonic() if self._since is None else self._since
        self._error = error

    async def wait(self) -> None:
        """Begin the next round later; ReplicaBehind after `patience` seconds without success."""
        if self._since is not None and time.monotonic() - self._since > self._patience:
            raise ReplicaBehind(
                f"no replica has served the wanted version for {self._patience:g} s: {self._error}. Bring them there "
                "(`hubsync follow`, `SyncConfig.servers`), or ask for one that they serve"
            )
        await asyncio.sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_BEHIND_S)
        self.replicas.clear()


def _require_request(prompts: Sequence[Prompt], k: int, sampling: dict[str, Any]) -> None:
    if isinstance(prompts, (str, bytes)):
        raise ConfigError("prompts must be a list of them: each is a text, or token ids")
    for prompt in prompts:
        if not _is_prompt(prompt):
            raise ConfigError(f"a prompt is a text, or a list of token ids, not {prompt!r:.80}")
    if not isinstance(k, int) or k < 0:
        raise ConfigError(f"k must be a number of samples of each prompt, not {k!r:.80}")
    ours = {"n", "stream"} & sampling.keys()
    if ours:
        raise ConfigError(
            f"{' and '.join(sorted(ours))} cannot be chosen: each sample is one request, k for each prompt"
        )
    if not isinstance(sampling.get("seed"), (int, NoneType)):
        raise ConfigError(f"seed must be a whole number, not {sampling['seed']!r:.80}")


def _is_prompt(prompt: object) -> bool:
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, Sequence) and all(isinstance(token, int) for token in prompt)


def _seeded(sampling: dict[str, Any], offset: int) -> dict[str, Any]:
    """Sampling parameters with a distinct seed for each sample. Equal seeds give equal samples."""
    return sampling if sampling.get("seed") is None else {**sampling, "seed": sampling["seed"] + offset}


async def _in_order(tasks: Sequence[asyncio.Task[Sample]]) -> AsyncIterator[asyncio.Task[Sample]]:
    for task in tasks:
        await asyncio.wait({task})
        yield task


async def _as_completed(tasks: Sequence[asyncio.Task[Sample]]) -> AsyncIterator[asyncio.Task[Sample]]:
    completed: asyncio.Queue[asyncio.Task[Sample]] = asyncio.Queue()
    for task in tasks:
        task.add_done_callback(completed.put_nowait)
    for _ in tasks:
        yield await completed.get()
