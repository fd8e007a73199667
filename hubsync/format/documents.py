"""JSON documents as they are stored: sealed with a checksum, every field checked before use.

The checksum protects documents because nothing below checks what is downloaded: a flipped digit in a digest would look
like another branch of the run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from hubsync.errors import FormatError, UnknownFormat

FORMAT = "hubsync/2"
MAX_BYTES = 2 << 20  # of a head or manifest: parsing takes under a second, whatever it holds
MAX_TABLE_BYTES = 64 << 20  # of run.json, which lists all tensors, and of gc.json
SIGNATURE = "signature"  # field of a stored document, outside of its content
LAST_YEAR = 253e9  # seconds since 1970, in the year 9987: Python's dates end with 9999


def seal(doc: Mapping[str, Any], max_bytes: int = MAX_BYTES) -> bytes:
    """A document as it is stored: JSON, with a checksum over everything else in it.

    FormatError if it is larger than readers accept.
    """
    data = json.dumps({**doc, "checksum": _checksum(doc)}, indent=1).encode()
    _require_size(data, "the document to write", max_bytes)
    return data


def unseal(data: bytes, what: str, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Parse what `seal` wrote. `what` names the document in errors.

    The size is checked first: parsing a hostile document of some megabytes would hold the GIL for many seconds.

    Raises:
        FormatError: the document is too large, malformed or damaged.
        UnknownFormat: the document has another `format`.
    """
    _require_size(data, what, max_bytes)
    try:
        doc = versioned(json.loads(data), what)
        doc.pop(SIGNATURE, None)  # `hubsync.bucket.signed` checks it, for clients that have the key
        stated = doc.pop("checksum", None)
        found = _checksum(doc)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what}: not valid JSON ({error})") from None
    if stated != found:
        raise FormatError(f"{what}: damaged, the checksum does not match the content")
    return doc


def _require_size(data: bytes, what: str, max_bytes: int) -> None:
    if len(data) > max_bytes:
        raise FormatError(f"{what}: {len(data)} bytes, more than the limit of {max_bytes} for such a document")


def canonical(doc: Mapping[str, Any]) -> bytes:
    """The form of a document that is hashed and signed."""
    return json.dumps(doc, sort_keys=True, separators=(",", ":")).encode()


def _checksum(doc: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(doc)).hexdigest()


def versioned(doc: object, what: str) -> dict[str, Any]:
    """`doc`, if it is a JSON object of this format."""
    if not isinstance(doc, dict):
        raise FormatError(f"{what}: expected a JSON object")
    if doc.get("format") != FORMAT:
        raise UnknownFormat(f"{what}: {wrong_format(doc.get('format'), FORMAT)}")
    return doc


def wrong_format(found: object, ours: str) -> str:
    """What is wrong with a format that is not ours, and what to do."""
    if found == f"{ours.partition('/')[0]}/1":
        return f"format {found!r} was written by hubsync 0.1: start a new run under another prefix"
    return f"format {found!r:.80} is not {ours!r}; upgrade hubsync on the side that reads"


class Fields:
    """The fields of a JSON object. Each access checks type and range; FormatError if it fails.

    Args:
        doc: the parsed object.
        what: its name in errors.
    """

    def __init__(self, doc: Mapping[str, Any], what: str):
        self._doc = doc
        self._what = what

    def has(self, key: str) -> bool:
        """Whether the field is present and not null."""
        return self._doc.get(key) is not None

    def integer(self, key: str, low: int, high: int) -> int:
        value = self._doc.get(key)
        if type(value) is not int or not low <= value <= high:
            raise FormatError(f"{self._what}: {key} must be an integer from {low} to {high}, not {value!r:.80}")
        return value

    def seconds(self, key: str) -> float:
        """Seconds since 1970."""
        value = self._doc.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < LAST_YEAR:
            raise FormatError(f"{self._what}: {key} must be seconds since 1970, not {value!r:.80}")
        return float(value)

    def text(self, key: str, longest: int) -> str:
        """Printable text of at most `longest` characters."""
        value = self._doc.get(key)
        if not isinstance(value, str) or len(value) > longest or not value.isprintable():
            raise FormatError(f"{self._what}: {key} must be printable text of at most {longest} characters")
        return value

    def match(self, key: str, pattern: re.Pattern[str]) -> str:
        value = self._doc.get(key)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise FormatError(f"{self._what}: {key} is malformed: {value!r:.80}")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self._doc.get(key)
        if value not in choices:
            raise FormatError(f"{self._what}: {key} must be one of {', '.join(choices)}, not {value!r:.80}")
        return str(value)
