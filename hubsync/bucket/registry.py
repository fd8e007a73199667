"""Bucket backends by the scheme of their addresses.

Built in are `hf://` (a Hugging Face bucket) and addresses without a scheme (a directory). A package adds a scheme with
an entry point of the group `hubsync.buckets`. Its name is the scheme in lower case, its value an `Opener`:

    [project.entry-points."hubsync.buckets"]
    toy = "toy_bucket:ToyBucket"

Then `toy://anything` is an address wherever hubsync takes one.
"""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from typing import Protocol

from hubsync.errors import ConfigError

from .address import not_an_address
from .base import Bucket
from .redaction import redacted

ENTRY_POINTS = "hubsync.buckets"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class Opener(Protocol):
    """Opens the bucket at an address: a subclass of `Bucket`, or a function that returns a `Bucket`."""

    def __call__(self, address: str, *, create: bool, token: str | None, endpoint: str | None) -> Bucket:
        """Open the bucket at `address`.

        Args:
            address: as the user typed it, scheme included.
            create: make the bucket if it does not exist.
            token: Hugging Face token. Backends with other credentials read these from their environment.
            endpoint: URL of the Hub. Other backends ignore it.

        Raises:
            ConfigError: the address does not have the backend's form.
            BucketError: see `open_bucket`.
        """
        ...


def _open_hub(address: str, *, create: bool, token: str | None, endpoint: str | None) -> Bucket:
    from .hub import HubBucket  # imports huggingface_hub

    return HubBucket(address, create=create, token=token, endpoint=endpoint)


def _open_directory(address: str, *, create: bool, token: str | None, endpoint: str | None) -> Bucket:
    from .local import LocalBucket

    return LocalBucket(address, create=create)


_BUILT_IN: dict[str, Opener] = {"hf": _open_hub}


def opener_for(address: str) -> Opener:
    """The opener for the scheme of an address. ConfigError if it is malformed, or no backend has its scheme."""
    match = _SCHEME.match(address)
    if match is not None:
        scheme = match[1].lower()
        return _BUILT_IN[scheme] if scheme in _BUILT_IN else _registered(scheme, address)
    if not address.strip() or "://" in address or address.startswith("hf:"):
        raise not_an_address(address)
    return _open_directory


def _registered(scheme: str, address: str) -> Opener:
    registered = entry_points(group=ENTRY_POINTS)
    found = [point for point in registered if point.name == scheme]
    if not found:
        known = "".join(f", {name}://" for name in sorted(registered.names))
        raise ConfigError(
            f"{redacted(address)!r:.200} is not a bucket address: no backend for {scheme}:// is installed. Use "
            f"hf://buckets/<namespace>/<name>/<run>{known} or a directory, or install a package that registers "
            f"{scheme!r} in the entry point group {ENTRY_POINTS!r}"
        )
    if len(found) > 1:
        values = ", ".join(sorted(point.value for point in found))
        raise ConfigError(
            f"several packages register a bucket backend for {scheme}:// ({values}): uninstall all but one"
        )
    try:
        opener: Opener = found[0].load()
    except Exception as error:
        raise ConfigError(
            f"the bucket backend for {scheme}:// ({found[0].value}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return opener
