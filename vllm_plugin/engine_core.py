"""vLLM's engine core as `hubsync.apply.engine.EngineCore`: caches, labels, pauses, and turns of its loop.

Used here, the same in vLLM 0.27 and 0.32: `EngineCore.scheduler` (`requests`, `running`,
`kv_cache_manager.coordinator.single_type_managers`, `reset_prefix_cache`, `reset_connector_cache`), `.batch_queue`,
`.resume_scheduler`, `.is_scheduler_paused`, `.reset_encoder_cache`, `.set_weight_version`,
`.model_executor.sleeping_tags`;
`EngineCoreProc.input_queue`; `BlockPool` as in `_forget_blocks`; `Request.block_hashes` and `.cache_salt`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from hubsync.apply.engine import Answers

from .bell import Bell

logger = logging.getLogger("vllm.hubsync")

# Between two looks at the workers, in seconds: where there is no loop that a bell could wake, and beside the bell,
# which workers on other machines cannot ring.
_POLL_S = 0.01
_UNHEARD_S = 0.25


class CoreTurn:
    """Type of hubsync's own requests in the core's input queue: a function to call."""


class VLLMEngineCore:
    """One engine core of vLLM.

    Args:
        core: the EngineCore.
        collective_rpc: calls its workers; vLLM's own.
    """

    def __init__(self, core: Any, collective_rpc: Callable[..., list[Any]]):
        self.index = int(getattr(core, "engine_index", 0))
        self.labels_in_flight: deque[str] = deque()  # of batches whose forward pass began before the label changed
        self._core = core
        self._rpc = collective_rpc
        parallel = core.vllm_config.parallel_config
        self._spans_engines = parallel.data_parallel_size > 1  # 1 where the engines of a server are independent
        self._stages = parallel.pipeline_parallel_size > 1
        self._bell: Bell | None = None
        self._looks: list[Callable[[], bool]] = []  # at what is waited for; True once that has ended

    @property
    def alone(self) -> bool:
        return not self._spans_engines

    @property
    def still(self) -> bool:
        core = self._core
        pausing = getattr(core, "pending_pause", False) or core.engines_running
        return self.paused and not pausing and not core.batch_queue

    def settle(self) -> None:
        if self._stages:
            for answer, *_ in self._core.batch_queue or ():
                answer.result()  # the core gets the same result later

    @property
    def paused(self) -> bool:
        return bool(self._core.is_scheduler_paused())

    @property
    def asleep(self) -> bool:
        return "weights" in getattr(self._core.model_executor, "sleeping_tags", ())

    @property
    def label(self) -> str:
        return str(getattr(self._core, "_weight_version", ""))  # 0.26 has none

    def call(self, method: str, *args: Any, **kwargs: Any) -> Answers:
        return self._rpc(method, None, args, kwargs)

    def statuses(self) -> Answers:
        return self.on_workers("status")

    def on_workers(self, step: str, *args: Any) -> Answers:
        """Call a function of `vllm_plugin.worker` on all workers, also where the extension is not loaded."""
        from . import worker

        return self._rpc(getattr(worker, step), None, args, None)

    def recompute(self) -> None:
        if not self._core.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
            raise RuntimeError("the KV connector would not drop its cache")
        self._reset_encoder_cache()

    def isolate(self) -> None:
        scheduler = self._core.scheduler
        if not scheduler.reset_connector_cache():
            raise RuntimeError("the KV connector would not drop its cache")
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        for pool in {id(manager.block_pool): manager.block_pool for manager in managers}.values():
            _forget_blocks(pool)
        running = {request.request_id for request in scheduler.running}
        for request in scheduler.requests.values():
            # A waiting one may hold blocks too, whose content is still being transferred.
            if request.request_id in running or request.num_computed_tokens > 0:
                _set_apart(request)
        self._reset_encoder_cache()

    def _reset_encoder_cache(self) -> None:
        if self._core.vllm_config.model_config.is_multimodal_model:
            self._core.reset_encoder_cache()

    def set_label(self, version: str) -> None:
        if not hasattr(self._core, "set_weight_version"):
            return  # vLLM 0.26 states no versions
        in_flight = len(self._core.batch_queue or ())
        while len(self.labels_in_flight) < in_flight:
            self.labels_in_flight.append(self.label)
        self._core.set_weight_version(version)

    def resume(self) -> None:
        if self._core.model_executor.is_sleeping:
            raise RuntimeError("this server sleeps: wake it up")
        self._core.resume_scheduler()

    def later(self, seconds: float, turn: Callable[[], None]) -> Callable[[], None]:
        inbox = getattr(self._core, "input_queue", None)
        if inbox is None:  # in the process that uses it: it ends with its client
            return lambda: None
        timer = threading.Timer(seconds, inbox.put_nowait, [(CoreTurn, turn)])
        timer.daemon = True
        timer.start()
        return timer.cancel

    def until(self, reached: Callable[[], bool]) -> Future[None] | None:
        if not hasattr(self._core, "input_queue"):
            while not reached():
                time.sleep(_POLL_S)
            return None
        self._hang_bell()
        future: Future[None] = Future()

        def look() -> bool:
            if not future.done():
                try:
                    if reached():
                        future.set_result(None)
                except Exception as error:
                    future.set_exception(error)
            return future.done()

        def look_later() -> None:
            if not look():
                self.later(_UNHEARD_S, look_later)

        if not look():
            self._looks.append(look)
            self.later(_UNHEARD_S, look_later)
        return future

    def _hang_bell(self) -> None:
        """Have the workers wake the loop after each background job."""
        if self._bell is not None:
            return
        try:
            self._bell = Bell(lambda: self._core.input_queue.put_nowait((CoreTurn, self._look_at_all)))
        except OSError as error:
            logger.warning("hubsync: the engine looks at its workers every %g s: %s", _UNHEARD_S, error)
            return
        self.on_workers("report_to", self._bell.address)

    def _look_at_all(self) -> None:
        self._looks = [look for look in self._looks if not look()]


def _forget_blocks(pool: Any) -> None:
    """Take all blocks out of the prefix cache. Blocks that requests hold stay theirs.

    This is `BlockPool.reset_prefix_cache` without its condition that no block is in use. `evict_blocks` has no such
    condition, but takes 20 times as long. Only blocks that are in the cache are touched: a GPU has tens of thousands.
    """
    named = list(_named_blocks(pool))
    pool.cached_block_hash_to_block = type(pool.cached_block_hash_to_block)()
    getattr(pool, "cached_block_hashes_by_block", {}).clear()
    if watched := list(getattr(pool, "_reuse_watchers", ())):  # not in 0.27
        pool._notify_reuse([pool.blocks[number] for number in watched])
    for block in named:
        block.reset_hash()
    if pool.metrics_collector:
        pool.metrics_collector.reset()
    if pool.enable_kv_cache_events:
        from vllm.distributed.kv_events import AllBlocksCleared

        pool.kv_event_queue.append(AllBlocksCleared())


def _named_blocks(pool: Any) -> Iterator[Any]:
    """The blocks in the prefix cache; all where this vLLM keeps them otherwise."""
    names = pool.cached_block_hash_to_block
    by_name = names if isinstance(names, dict) else getattr(names, "_cache", None)
    if not isinstance(by_name, dict):
        yield from pool.blocks
        return
    for held in by_name.values():
        yield from held.values() if isinstance(held, dict) else (held,)
    for number in getattr(pool, "cached_block_hashes_by_block", ()):
        yield pool.blocks[number]


def _set_apart(request: Any) -> None:
    """Cache what this request computes from now on under names that no other request asks for.

    The name of a block is a hash of its tokens and of the block before it. So it is enough to change the existing names
    or, if there are none yet, the salt of the first.
    """
    request.cache_salt = os.urandom(16).hex()
    request.block_hashes[:] = [os.urandom(len(name)) for name in request.block_hashes]
