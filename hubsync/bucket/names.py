"""Object names: what may be joined to a directory or a prefix, and nothing else.

Names come from `hubsync.chain.Layout`, but listings and addresses come from outside. One rule for all of them: segments
of plain ASCII separated by `/`, none empty, none starting with a dot. So no name climbs out of its bucket, and
dot-files are free for the implementation's own use.
"""

from __future__ import annotations

import re

from hubsync.errors import BucketError

SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._=+@-]{0,254}"

_NAME = re.compile(rf"{SEGMENT}(/{SEGMENT})*")


def is_name(path: str) -> bool:
    """Whether `path` is an object name."""
    return len(path) <= 1024 and _NAME.fullmatch(path) is not None


def checked(path: str) -> str:
    """`path` itself; BucketError if it is not an object name."""
    if not is_name(path):
        raise BucketError(
            f"{path!r:.200} is not an object name: use letters, digits and ._=+@- in segments separated by single "
            "slashes, none starting with a dot"
        )
    return path


def checked_directory(prefix: str) -> str:
    """`prefix` of a listing without a trailing slash; "" is the whole bucket. BucketError if it is not a name."""
    return checked(prefix.rstrip("/")) if prefix else ""
