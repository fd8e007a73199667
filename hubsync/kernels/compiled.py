"""`@compiled`: numba's machine code, kept on disk where this machine allows it, and made again where it does not.

By itself numba fails at import if neither the installation nor the user's cache can be written (a read-only container,
no home), and at the first call if the disk is full or a kept file is damaged.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config, njit
from numba.core.caching import FunctionCache, NullCache

from hubsync.cache import private_directory
from hubsync.progress import note

logger = logging.getLogger(__name__)

_REMEDY = "Set NUMBA_CACHE_DIR to a directory that this user can write"


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function at its first call, without the GIL. The machine code is kept for the next process."""
    made: Any = njit(nogil=True)(function)
    if hasattr(made, "enable_caching"):  # a plain function under NUMBA_DISABLE_JIT
        made._cache = _cache_of(function)  # what `enable_caching` does, with another cache
    return made


class _OptionalCache(FunctionCache):
    """A cache that no error of the disk gets out of: what cannot be read is compiled, what cannot be kept is not."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        kept = None
        try:
            kept = super().load_overload(sig, target_context)
        except OSError:  # gone, or not readable by this user
            pass
        except Exception as error:  # unpickling a damaged file may raise anything
            _report(f"compiled code in {self.cache_path} cannot be read ({error!r:.200}). Delete that directory")
        if kept is None:
            note("hubsync compiles its kernels, once for this machine: some seconds for each", once=True)
        return kept

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _report(
                f"compiled code cannot be kept in {self.cache_path} ({error!r:.200}): every process compiles it again, "
                f"for some seconds. {_REMEDY}"
            )


def _cache_of(function: Callable[..., Any]) -> Any:
    try:
        return _OptionalCache(function)
    except RuntimeError:  # no directory that can be written
        directory = _fallback()
    if directory is None:
        return NullCache()
    usual, config.CACHE_DIR = config.CACHE_DIR, str(directory)
    try:
        return _OptionalCache(function)
    except RuntimeError:
        return NullCache()
    finally:
        config.CACHE_DIR = usual


@functools.cache
def _fallback() -> Path | None:
    """Where compiled code is kept if numba's own places cannot be written; None for nowhere."""
    directory = private_directory()
    where = "nowhere: every process compiles it again, for some seconds" if directory is None else f"in {directory}"
    _report(f"neither the installation nor the user's cache can be written: compiled code is kept {where}. {_REMEDY}")
    return directory


@functools.cache  # each message once for each process
def _report(message: str) -> None:
    logger.warning("%s", message)
