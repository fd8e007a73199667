"""Directories of local files. Imports only the standard library, because vLLM's engine core imports it too."""

from __future__ import annotations

import functools
import logging
import os
import stat
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "HUBSYNC_CACHE"


def default_cache() -> Path:
    """`HUBSYNC_CACHE`, else `hubsync` in the user's cache directory.

    Where that cannot be written (no home, a read-only container), a private directory of this user below TMPDIR.
    """
    pinned = os.environ.get(CACHE_VARIABLE)
    if pinned:
        return Path(pinned)
    usual = _user_cache()
    if usual is not None and _can_be_written(usual):
        return usual
    return _instead_of(usual) or usual or Path(tempfile.mkdtemp(prefix="hubsync-"))


def private_directory() -> Path | None:
    """`hubsync-<user id>` below TMPDIR, made if needed; None if it cannot be made.

    Only this user can write there. A directory of the same name that others can write to is not used: the files in it
    may be theirs.
    """
    try:
        path = Path(tempfile.gettempdir(), f"hubsync-{os.getuid()}")
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            pass
        status = path.lstat()
    except OSError:
        return None
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return path if ours and os.access(path, os.W_OK | os.X_OK) else None


def _user_cache() -> Path | None:
    """`hubsync` in the user's cache directory; None for a user without a home."""
    pinned = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(pinned) if pinned else Path.home() / ".cache") / "hubsync"
    except RuntimeError:  # neither HOME nor an entry for this user
        return None


def _can_be_written(directory: Path) -> bool:
    """Whether `directory` can be written, or made. Writes nothing."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


@functools.cache  # one message for each process
def _instead_of(usual: Path | None) -> Path | None:
    private = private_directory()
    if private is not None:
        what = "this user has no home" if usual is None else f"{usual} cannot be written"
        logger.warning("%s: files are kept in %s. Set %s to choose a directory", what, private, CACHE_VARIABLE)
    return private
