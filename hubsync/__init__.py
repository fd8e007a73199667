"""hubsync: the weights of a running vLLM server follow a trainer, through a Hugging Face bucket, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hubsync.lifecycle.weight_syncer import WeightSyncer
    from hubsync.publish.config import SyncConfig
    from hubsync.publish.engine import DeltaWeightTransferEngine
    from hubsync.publish.view.cuts import Cut

__all__ = ["Cut", "DeltaWeightTransferEngine", "SyncConfig", "WeightSyncer", "__version__"]

_LAZY = {
    "Cut": ".publish.view.cuts",
    "DeltaWeightTransferEngine": ".publish.engine",
    "SyncConfig": ".publish.config",
    "WeightSyncer": ".lifecycle.weight_syncer",
}


def __getattr__(name: str) -> Any:
    # Lazily, so that the inference side can import `hubsync.errors` without paying for the trainer side.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
