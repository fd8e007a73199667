"""Object names: the only strings that are joined to a directory or a prefix.

`hubsync.chain.Layout` makes names, but listings and addresses come from outside. One rule holds for all of them:
segments of plain ASCII separated by `/`, none empty, none starting with a dot. So no name leaves its bucket, and
dot-files stay free for an implementation's own use.
"""

from __future__ import annotations

import re

from hubsync.errors import BucketError

ALLOWED = "letters, digits and ._=+@- only, beginning with a letter, a digit or _"
SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._=+@-]{0,254}"

_NAME = re.compile(rf"{SEGMENT}(/{SEGMENT})*")


def is_name(path: str) -> bool:
    """Whether `path` is an object name."""
    return len(path) <= 1024 and _NAME.fullmatch(path) is not None


def checked(path: str) -> str:
    """Return `path`; BucketError if it is not an object name."""
    if not is_name(path):
        raise BucketError(
            f"{path!r:.200} is not an object name: use letters, digits and ._=+@- in segments separated by single "
            "slashes, none starting with a dot"
        )
    return path


def checked_directory(prefix: str) -> str:
    """Return the `prefix` of a listing without its trailing slash. "" is the whole bucket. BucketError if malformed."""
    return checked(prefix.rstrip("/")) if prefix else ""
