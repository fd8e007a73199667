"""The worker extension of verl's own replicas: verl's and hubsync's in one, because vLLM takes a single one.

actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls: hubsync.integrations.verl_worker.WorkerExtension
"""

from __future__ import annotations

from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from vllm_plugin import DeltaWorkerExtension


class WorkerExtension(DeltaWorkerExtension, vLLMColocateWorkerExtension):
    """Both sets of methods."""
