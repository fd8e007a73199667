"""hubsync inside vLLM: `vllm serve MODEL --worker-extension-cls vllm_plugin.DeltaWorkerExtension`.

Importing this package imports neither vLLM nor torch, because vLLM loads it through its `vllm.general_plugins` entry
point in every one of its processes, also in servers that do not use hubsync.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .extension import DeltaWorkerExtension

__all__ = ["DeltaWorkerExtension", "register"]


def register() -> None:
    """Entry point of `vllm.general_plugins`: makes this package known to vLLM, and changes nothing.

    Everything hubsync does begins in the worker that names the extension class; see `vllm_plugin.compat` for the one
    thing that must happen before a model is loaded.
    """


def __getattr__(name: str) -> Any:
    if name == "DeltaWorkerExtension":
        from .extension import DeltaWorkerExtension

        return DeltaWorkerExtension
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
