"""Addresses of Hugging Face buckets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hubsync.errors import ConfigError

from .names import ALLOWED, SEGMENT
from .redaction import redacted

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
    said = (
        f"{redacted(address)!r:.200} is not a bucket address; use hf://buckets/<namespace>/<name>/<run> for a Hugging "
        "Face bucket, or a directory such as /data/runs/my-run"
    )
    return ConfigError(said + _wrong_segment(address))


def _wrong_segment(address: str) -> str:
    """Which part of an address of the right form has characters that are not allowed; "" if there is none."""
    if not address.startswith("hf://buckets/"):
        return ""
    namespace, name, *run = [*address.removeprefix("hf://buckets/").rstrip("/").split("/"), "", ""][:64]
    for what, part in (("namespace", namespace), ("bucket name", name)):
        if part and re.fullmatch(_PART, part) is None:
            return f". The {what} {redacted(part)!r:.80} must have letters, digits and ._- only, none of ._- first"
    wrong = next((part for part in run[:-2] if re.fullmatch(SEGMENT, part) is None), None)
    return "" if wrong is None else f". The part {redacted(wrong)!r:.80} of the run must have {ALLOWED}"
