"""What hubsync needs of an inference server: a protocol that the client of each inference engine implements.

vLLM's client is `hubsync.replicas.vllm_http`. Another engine adds a file with a class like it and registers the URL
schemes it serves; see `hubsync.replicas.engines`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from hubsync.errors import ConfigError

_LONGEST_WAIT_S = 1e6  # some days; waiting functions take no infinity


class InferenceServer(Protocol):
    """Client of one inference server's control endpoints.

    Every method may be called from several threads, and raises a `ReplicaError` that says what to do:
    ReplicaUnreachable if there was no answer, ReplicaUnsuitable if the server lacks something, ReplicaRefused if it
    refused. `pause`, `resume`, `load_adapter` and all worker methods are idempotent.

    Attributes:
        url: base URL for messages, without a slash at its end, and without user and password.
    """

    @property
    def url(self) -> str: ...

    def version(self) -> str:
        """The engine's version. ReplicaUnsuitable if hubsync does not support it."""

    def world_size(self) -> int:
        """Number of workers: tensor x pipeline x data parallel."""

    def pause(self) -> None:
        """Freeze all requests between two forward passes until `resume`. Their KV caches stay."""

    def resume(self) -> None:
        """Let frozen requests go on."""

    def generate_a_token(self) -> None:
        """Run the model once, on a prompt of one token."""

    def load_adapter(self, name: str, path: str) -> None:
        """Serve the LoRA adapter in directory `path` of the server's host to requests for model `name`."""

    def rpc(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Call a worker method (`hubsync.apply.protocol.WorkerMethod`) on every rank.

        Returns:
            one document per rank, in rank order.

        Raises:
            HubsyncError: the error of the first rank that refused; see `error_from_json`. `protocol.REPORTING` report
                errors and raise none.
        """

    def close(self) -> None:
        """Close all connections. Call it after the last request has returned."""


def checked_url(url: str, schemes: Sequence[str] = ("http", "https")) -> str:
    """The base URL of a server, without a slash at its end. ConfigError for anything else."""
    if not isinstance(url, str):
        raise ConfigError(f"{url!r:.80} is not the URL of a server: write it like 'http://10.0.0.7:8000'")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0 and url.isprintable()
    except ValueError:  # unbalanced brackets, or a port that is not a number
        valid = False
    if not valid:
        raise ConfigError(f"{shown(url)!r:.80} is not the URL of a server: write it like http://10.0.0.7:8000")
    return url.rstrip("/")


def plain_url(url: str) -> str:
    """A server's base URL without user, password and slash at its end: what tells two servers apart."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")


def shown(url: str) -> str:
    """What messages show of text that should be a URL: `***` in place of anything that may be a password."""
    scheme, separator, rest = url.rpartition("://")
    _, credentials, host = rest.rpartition("@")
    return f"{scheme}{separator}***@{host}" if credentials else url


def checked_urls(urls: Sequence[str], schemes: Sequence[str] = ("http", "https")) -> list[str]:
    """Base URLs of at least one server, each named once. ConfigError otherwise."""
    if isinstance(urls, str) or not urls:
        given = repr(shown(urls)) if isinstance(urls, str) else repr(urls)
        raise ConfigError(f"give a list with the URL of at least one server, not {given:.80}")
    checked = [checked_url(url, schemes) for url in urls]
    plain = [plain_url(url) for url in checked]
    twice = next((url for number, url in enumerate(plain) if url in plain[:number]), None)
    if twice is not None:
        raise ConfigError(f"{twice} is named twice: name each server once")
    return checked


def checked_seconds(what: str, seconds: float, *, zero: bool = False) -> float:
    """A time to wait, in seconds. ConfigError if it is not a number, or not in a range that can be waited.

    Args:
        what: name of the setting, for the message.
        zero: whether 0 is allowed.
    """
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not is_number or not 0 <= seconds <= _LONGEST_WAIT_S or (seconds == 0 and not zero):
        least = "0 or more" if zero else "more than 0"
        raise ConfigError(
            f"{what} must be a number of seconds, {least} and at most {_LONGEST_WAIT_S:g}, not {seconds!r}"
        )
    return seconds
