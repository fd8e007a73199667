"""hubsync inside vLLM: `vllm serve MODEL --worker-extension-cls vllm_plugin.DeltaWorkerExtension`.

Importing this package imports neither vLLM nor torch, because vLLM loads it through its `vllm.general_plugins` entry
point in every one of its processes, also in servers that do not use hubsync.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .extension import DeltaWorkerExtension

__all__ = ["DeltaWorkerExtension", "register"]


def register() -> None:
    """Entry point of `vllm.general_plugins`, called in every process of vLLM; cheap and idempotent.

    Puts a thin layer around the engine core's calls to its workers (`core`), which acts on hubsync's calls only, and
    makes the weight transfer backend "hubsync" known (`backend`).
    """
    if "vllm" in sys.modules:
        from . import compat, core

        core.install()
        compat.register_backend()


def __getattr__(name: str) -> Any:
    if name == "DeltaWorkerExtension":
        from .extension import DeltaWorkerExtension

        return DeltaWorkerExtension
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
