"""How errors travel: as answers, because a worker that raises puts vLLM's queues of answers out of step.

With several workers vLLM reads only the first one's failure and leaves the others' in their queues, so after one
exception every later answer would belong to an earlier question.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

from hubsync import errors
from hubsync.errors import HubsyncError, ReplicaRefused

logger = logging.getLogger("vllm.hubsync")

Method = Callable[..., dict[str, Any]]


def answering(method: Method) -> Method:
    """Turn every error of a worker's method into an answer, `{"error": {"type", "message"}}`."""

    @functools.wraps(method)
    def answer(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            expected = isinstance(error, HubsyncError)
            logger.log(logging.WARNING if expected else logging.ERROR, "hubsync: %s", error, exc_info=not expected)
            return {"error": describe(error)}

    return answer


def describe(error: Exception) -> dict[str, str]:
    """An error as it travels: its class in `hubsync.errors`, and its message."""
    if isinstance(error, HubsyncError):
        return {"type": type(error).__name__, "message": str(error)}
    return {"type": "ReplicaError", "message": f"{type(error).__name__}: {error}"}


def refusal(kind: str, message: str) -> HubsyncError:
    """The error that a rank named; never any class but those of `hubsync.errors`."""
    found = getattr(errors, kind, None)
    return found(message) if isinstance(found, type) and issubclass(found, HubsyncError) else ReplicaRefused(message)


def first_error(answers: Iterable[dict[str, Any]]) -> HubsyncError | None:
    """The error of the first worker that answered one."""
    for answer in answers:
        if answer.get("error"):
            return refusal(str(answer["error"].get("type")), str(answer["error"].get("message")))
    return None
