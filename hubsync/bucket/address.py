"""Addresses of Hugging Face buckets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hubsync.errors import ConfigError

from .names import SEGMENT

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB = re.compile(rf"hf://buckets/({_PART}/{_PART})/({SEGMENT}(?:/{SEGMENT})*)/?")


@dataclass(frozen=True)
class HubAddress:
    """`hf://buckets/<namespace>/<name>/<run>`.

    Attributes:
        bucket: `<namespace>/<name>`.
        prefix: `<run>`, one or more segments.
    """

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, address: str) -> HubAddress:
        """ConfigError if the address has another form."""
        match = _HUB.fullmatch(address)
        if match is None:
            raise not_an_address(address)
        return cls(match[1], match[2])


def not_an_address(address: str) -> ConfigError:
    """The error for an address that has neither form."""
    return ConfigError(
        f"{address!r:.200} is not a bucket address; use hf://buckets/<namespace>/<name>/<run> for a Hugging Face "
        "bucket, or a directory such as /data/runs/my-run"
    )
