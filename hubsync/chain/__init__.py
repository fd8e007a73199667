"""The versions of a run: object names, the order of writes, and paths from one version to another.

The names below are imported at their first use: only decoding and replaying deltas needs torch and numba.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compaction import Compactor
    from .layout import Layout
    from .planner import Plan, Step
    from .reader import ChainReader
    from .version_info import VersionInfo
    from .writer import ChainWriter

__all__ = ["ChainReader", "ChainWriter", "Compactor", "Layout", "Plan", "Step", "VersionInfo"]

_LAZY = {
    "ChainReader": ".reader",
    "ChainWriter": ".writer",
    "Compactor": ".compaction",
    "Layout": ".layout",
    "Plan": ".planner",
    "Step": ".planner",
    "VersionInfo": ".version_info",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name], __name__), name)
