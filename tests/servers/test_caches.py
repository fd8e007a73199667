"""Caches that old weights have filled, in vLLM's own classes: a commit leaves none of them usable.

Keys and values, and outputs of encoders, belong to the scheduler. The classes here are vLLM's, without a model.
`test_turns` and `test_extension` check the same on engines that generate.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_plugin import compat
from vllm_plugin.engine_core import VLLMEngineCore

# No server, but half of vLLM is imported.
pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(compat.vllm_version() < "0.32", reason="its classes are made in another way"),
]

BLOCK = 16
PROMPT = list(range(5 * BLOCK + 1))


class Cache:
    """vLLM's cache manager for layers of several kinds, and a scheduler's view of it."""

    def __init__(self, *specs: Any):
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        self.hasher = get_request_block_hasher(BLOCK, hash_function)
        groups = [KVCacheGroupSpec([f"layer{number}"], spec) for number, spec in enumerate(specs)]
        config = KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=groups)
        self.manager = KVCacheManager(config, max_model_len=512, scheduler_block_size=BLOCK, hash_block_size=BLOCK)
        self.scheduler = SimpleNamespace(
            kv_cache_manager=self.manager,
            running=[],
            requests={},
            connector=None,
            aux_output_connector=None,
            prev_step_scheduled_req_ids=set(),
        )
        self.scheduler.reset_connector_cache = lambda: Scheduler.reset_connector_cache(self.scheduler)
        self.scheduler.reset_prefix_cache = lambda **options: Scheduler.reset_prefix_cache(self.scheduler, **options)
        parallel = SimpleNamespace(data_parallel_size=1, pipeline_parallel_size=1)
        self.core: Any = SimpleNamespace(
            scheduler=self.scheduler,
            vllm_config=SimpleNamespace(
                parallel_config=parallel, model_config=SimpleNamespace(is_multimodal_model=False)
            ),
        )
        self.engine = VLLMEngineCore(self.core, lambda *call: [])

    def request(self, name: str) -> Any:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        return Request(name, PROMPT, SamplingParams(max_tokens=1), None, block_hasher=self.hasher)

    def compute(self, name: str) -> Any:
        """A request that has computed its prompt."""
        request = self.request(name)
        blocks, computed = self.hit(request)
        assert self.manager.allocate_slots(request, len(PROMPT) - computed, computed, blocks) is not None
        request.num_computed_tokens = len(PROMPT)
        self.manager.cache_blocks(request, len(PROMPT))
        return request

    def hit(self, request: Any) -> tuple[Any, int]:
        blocks, computed = self.manager.get_computed_blocks(request)[:2]
        return blocks, computed

    def cached_tokens(self) -> int:
        """Tokens that a new request with the same prompt would not compute."""
        return self.hit(self.request("probe"))[1]


def attention(**options: Any) -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.bfloat16, **options)


def mamba() -> Any:
    from vllm.v1.kv_cache_interface import MambaSpec

    page = attention().page_size_bytes
    return MambaSpec(
        block_size=BLOCK,
        shapes=((4, 4),),
        dtypes=(torch.float32,),
        page_size_padded=page,
        mamba_cache_mode="all",
    )


@pytest.mark.parametrize("layers", ["attention", "attention and mamba"])
@pytest.mark.parametrize("policy", ["recompute", "isolate"])
@pytest.mark.parametrize("running", [False, True])
def test_no_prefix_and_no_state_of_old_weights_is_hit(layers: str, policy: str, running: bool) -> None:
    cache = Cache(attention(), *([mamba()] if "mamba" in layers else []))
    request = cache.compute("old")
    if running and policy == "isolate":
        cache.scheduler.running.append(request)
        cache.scheduler.requests[request.request_id] = request
    else:
        cache.manager.free(request)
    assert cache.cached_tokens() == 5 * BLOCK
    getattr(cache.engine, policy)()
    assert cache.cached_tokens() == 0
    if running and policy == "isolate":  # what it fills from now on has other names
        request.append_output_token_ids(list(range(2 * BLOCK)))
        assert cache.manager.allocate_slots(request, 2 * BLOCK) is not None
        cache.manager.free(request)
        assert cache.cached_tokens() == 0
    cache.manager.free(cache.compute("new"))
    assert cache.cached_tokens() == 5 * BLOCK, "new weights fill the caches again"


@pytest.mark.parametrize("policy", ["recompute", "isolate"])
def test_outputs_of_encoders_are_dropped_in_scheduler_and_workers(policy: str) -> None:
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    cache = Cache(attention())
    outputs = cache.scheduler.encoder_cache_manager = EncoderCacheManager(cache_size=100)
    image = SimpleNamespace(
        mm_features=[SimpleNamespace(identifier="image", mm_hash="image", modality="image", data=None)],
        get_num_encoder_embeds=lambda item: 10,
        request_id="old",
    )
    outputs.allocate(image, 0)
    outputs.free(image)
    assert outputs.check_and_update_cache(image, 0), "an idle output is still cached"
    outputs.free(image)
    runner = SimpleNamespace(encoder_cache={"image": torch.ones(10)}, late_interaction_runner=SimpleNamespace())
    runner.late_interaction_runner.clear = lambda: None
    cache.core.vllm_config.model_config.is_multimodal_model = True
    cache.core.model_executor = SimpleNamespace(reset_encoder_cache=lambda: GPUModelRunner.reset_encoder_cache(runner))
    cache.core.reset_encoder_cache = lambda: EngineCore.reset_encoder_cache(cache.core)
    cache.scheduler.reset_encoder_cache = lambda: Scheduler.reset_encoder_cache(cache.scheduler)
    cache.scheduler.has_unfinished_requests = lambda: False
    getattr(cache.engine, policy)()
    assert not outputs.check_and_update_cache(image, 0)
    assert runner.encoder_cache == {}
