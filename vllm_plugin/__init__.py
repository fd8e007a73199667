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
    """Entry point of `vllm.general_plugins`; vLLM calls it in its API server, engine core and worker processes.

    Servers that do not use hubsync are not affected: the wrapped functions pass on all requests but hubsync's own. May
    be called any number of times.
    """
    if "vllm" in sys.modules:
        from .hooks import install

        install()


def __getattr__(name: str) -> Any:
    if name == "DeltaWorkerExtension":
        from .extension import DeltaWorkerExtension

        return DeltaWorkerExtension
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
