"""One replica of a sampler: its requests and its health."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hubsync.errors import ReplicaUnreachable

from .generation import Completion, GenerationClient, Prompt, Wanted
from .window import Load, RequestLimit

_BACK_OFF_S = 0.1
_LONGEST_BACK_OFF_S = 10.0


@dataclass(frozen=True)
class SampleRequest:
    """What every sample of a prompt asks for."""

    prompt: Prompt
    sampling: dict[str, Any]
    logprobs: bool
    wanted: Wanted


class SamplingReplica:
    """A replica and its health.

    Attributes:
        outstanding: number of its running requests.
        usable: whether it may get more requests.
        error: its last error.
        failures: failures in a row.
    """

    def __init__(self, client: GenerationClient, window: RequestLimit):
        self.client = client
        self.url = client.url
        self.window = window
        self.outstanding = 0
        self.usable = False
        self.error: Exception | None = None
        self.failures = 0
        self._dead = asyncio.Event()
        self._due = asyncio.Event()

    @property
    def has_capacity(self) -> bool:
        return self.usable and self.outstanding < self.window.size

    @property
    def share(self) -> float:
        return self.outstanding / self.window.size

    async def generate(self, request: SampleRequest) -> Completion:
        """Its completion; ReplicaUnreachable as soon as the replica is known to be dead."""
        answer = asyncio.ensure_future(
            self.client.generate(request.prompt, request.sampling, logprobs=request.logprobs, wanted=request.wanted)
        )
        death = asyncio.ensure_future(self._dead.wait())
        try:
            await asyncio.wait({answer, death}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ReplicaUnreachable(f"{self.url} died: {self.error}")
            return answer.result()
        finally:
            await cancel_all([answer, death])

    async def check(self) -> None:
        """Check its health and adapt its window. ReplicaUnreachable if it is not healthy."""
        if self.window.adapts:
            self.window.observe(Load.parse(await self.client.metrics()))
        await self.client.check_health()

    def suspect(self, error: Exception) -> None:
        """Record a failed request: the replica gets no more before a health check succeeds."""
        if self.usable:
            self.usable, self.error = False, error
            self.failures += 1
            self._due.set()

    def die(self, error: Exception) -> None:
        """Record a failed health check: its running requests are cancelled."""
        self.usable, self.error = False, error
        self.failures += 1
        self._dead.set()

    def live(self) -> None:
        self.usable = True
        self._dead.clear()

    async def wait(self, poll_s: float) -> None:
        """Wait until the next health check: longer after every failure in a row."""
        if self.usable:
            # Not `asyncio.wait_for`: before Python 3.12 it loses a cancellation that comes with the event.
            timer = asyncio.get_running_loop().call_later(poll_s, self._due.set)
            try:
                await self._due.wait()
            finally:
                timer.cancel()
        self._due.clear()
        if not self.usable and self.failures > 1:
            await asyncio.sleep(min(_BACK_OFF_S * 2.0 ** min(self.failures - 2, 30), _LONGEST_BACK_OFF_S))


async def cancel_all(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel them, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
