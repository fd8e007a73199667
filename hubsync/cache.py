"""Default cache directory. Imports only the standard library, because vLLM's engine core imports it too."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "HUBSYNC_CACHE"


def default_cache() -> Path:
    """`HUBSYNC_CACHE`, else `hubsync` in the user's cache directory."""
    pinned = os.environ.get(CACHE_VARIABLE)
    if pinned:
        return Path(pinned)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hubsync"
