"""Coordination of the ranks of one training: outcomes and small values, exchanged in rounds of all ranks.

Exceptions are exchanged like values: a rank with an exception still completes the round, and then all ranks raise it.
So no rank waits for one that has failed. A round is one small collective over a separate gloo group. The training
thread and the publisher's background thread each have a group, so their messages cannot mix.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch

from hubsync.errors import ConfigError, RankError
from hubsync.retry import reporting

T = TypeVar("T")

_JOIN = timedelta(minutes=10)  # from the first rank's engine to the last one's: models take a while to load
_PATIENCE = timedelta(days=1)  # a round waits for uploads of any length; a dead rank is noticed at once


class Ranks(ABC):
    """The processes of one training. Every method but the properties is a round: all ranks call it, in the same order.

    Raises:
        RankError: another rank has ended.
    """

    rank: int
    size: int
    group: torch.distributed.ProcessGroup | None
    """Process group of the rounds, for torch's collectives between two rounds; None for one process."""

    @abstractmethod
    def gather(self, do: Callable[[], T]) -> list[T]:
        """Call `do` on every rank, and return all values in rank order. All ranks raise what one rank raises."""

    @abstractmethod
    def together(self, do: Callable[[], T]) -> T:
        """Call `do` on every rank, and return this rank's value. All ranks raise what one rank raises."""

    @abstractmethod
    def first(self, do: Callable[[], T]) -> T:
        """Call `do` on rank 0 only. All ranks return its value or raise its exception."""

    @abstractmethod
    def collect(self, mine: torch.Tensor, sizes: Sequence[int], to: int) -> list[torch.Tensor] | None:
        """Gather every rank's bytes on rank `to`; None on the others.

        Args:
            mine: uint8, on the CPU.
            sizes: rank -> its number of bytes, the same on all ranks.
            to: the rank that gets the bytes.
        """

    @abstractmethod
    def apart(self) -> Ranks:
        """The same ranks for another thread, with independent rounds."""


class SingleRank(Ranks):
    """One process."""

    rank, size, group = 0, 1, None

    def gather(self, do: Callable[[], T]) -> list[T]:
        return [do()]

    def together(self, do: Callable[[], T]) -> T:
        return do()

    def first(self, do: Callable[[], T]) -> T:
        return do()

    def collect(self, mine: torch.Tensor, sizes: Sequence[int], to: int) -> list[torch.Tensor] | None:
        return [mine]

    def apart(self) -> Ranks:
        return self


@dataclass(frozen=True)
class _Outcome:
    """One rank's contribution to a round."""

    value: Any = None
    error: Exception | None = None


class GlooRanks(Ranks):
    """The ranks of torch.distributed's default process group."""

    def __init__(self) -> None:
        distributed = torch.distributed
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        try:
            self.group = distributed.new_group(backend="gloo", timeout=_JOIN)
            self._exchange(_Outcome())
        except (RuntimeError, RankError) as error:
            raise ConfigError(
                "under torch.distributed every rank must make an engine with the same model and config, or a "
                f"coordinator; not all {self.size} ranks did: {error}"
            ) from error
        distributed.distributed_c10d._set_pg_timeout(_PATIENCE, self.group)

    def gather(self, do: Callable[[], T]) -> list[T]:
        return [outcome.value for outcome in self._round(_attempt(do))]

    def together(self, do: Callable[[], T]) -> T:
        own = _attempt(do)
        self._round(_Outcome(error=own.error))
        return cast(T, own.value)

    def first(self, do: Callable[[], T]) -> T:
        return cast(T, self._round(_attempt(do) if self.rank == 0 else _Outcome())[0].value)

    def collect(self, mine: torch.Tensor, sizes: Sequence[int], to: int) -> list[torch.Tensor] | None:
        try:
            return self._collect(mine, sizes, to)
        except RuntimeError as error:
            raise _lost(error) from error

    def apart(self) -> Ranks:
        return GlooRanks()

    def _collect(self, mine: torch.Tensor, sizes: Sequence[int], to: int) -> list[torch.Tensor] | None:
        if self.rank != to:
            if len(mine):
                torch.distributed.send(mine, to, group=self.group)
            return None
        found = [
            mine if rank == to else torch.empty(size, dtype=torch.uint8, device="cpu")
            for rank, size in enumerate(sizes)
        ]
        for rank, received in enumerate(found):
            if rank != to and len(received):
                torch.distributed.recv(received, rank, group=self.group)
        return found

    def _round(self, own: _Outcome) -> list[_Outcome]:
        """Outcomes of all ranks. Raises the error of the lowest rank that has one."""
        outcomes = self._exchange(own if own.error is None else _Outcome(error=_portable(own.error)))
        for rank, outcome in enumerate(outcomes):
            if outcome.error is not None:
                cause = own.error if rank == self.rank else RankError(f"raised on rank {rank}")
                raise outcome.error from cause
        return outcomes

    def _exchange(self, own: _Outcome) -> list[_Outcome]:
        outcomes: list[Any] = [None] * self.size
        try:
            with reporting("the other ranks of this training"):
                torch.distributed.all_gather_object(outcomes, own, group=self.group)
        except RuntimeError as error:
            raise _lost(error) from error
        return outcomes


def join() -> Ranks:
    """All ranks of torch.distributed if it is initialised, else this process alone."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return GlooRanks()
    return SingleRank()


def _attempt(do: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(do())
    except Exception as error:
        return _Outcome(error=error)


def _portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, else a RankError with its text."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:  # a foreign class may raise anything when it is copied
        pass
    return RankError(f"{type(error).__name__}: {error}")


def _lost(error: Exception) -> RankError:
    return RankError(f"another rank of this training has ended or is unreachable: {error}")
