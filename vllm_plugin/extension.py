"""The worker extension: hubsync's methods on vLLM's workers, which `vllm_plugin.endpoints` serves.

    HUBSYNC_BUCKET=hf://buckets/me/runs/my-run VLLM_PLUGINS=hubsync \\
        vllm serve MODEL --worker-extension-cls vllm_plugin.DeltaWorkerExtension

vLLM mixes the class into its worker class. Requests reach a worker strictly between two forward passes.
"""

from __future__ import annotations

from typing import Any

from hubsync import progress
from hubsync.apply.session import Session
from hubsync.apply.worker_methods import WorkerMethods

from . import compat
from .worker import session_of

# vLLM imports this module in the worker process because the extension class is named on its command line, and it does
# so before it loads the model: the last moment at which packing can be avoided, and only in servers that use hubsync.
compat.keep_linears_live()

progress.off()  # workers share one terminal, and vLLM logs there


class DeltaWorkerExtension(WorkerMethods):
    """Delta weight sync for one vLLM worker. docs/protocol.md describes the methods."""

    # vLLM refuses an extension with a name that its worker has, and never calls its __init__: every name is prefixed,
    # and all state is one object, `self._hubsync`.

    def _hubsync_session(self) -> Session:
        return session_of(self)

    def _hubsync_about(self) -> dict[str, Any]:
        return compat.about(self)
