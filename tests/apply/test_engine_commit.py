"""Engine-side commits, the watchdog, native calls and hooks, on a model of an engine core."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from hubsync.apply.engine_commit import EngineCommit
from hubsync.errors import NoPath, ReplicaRefused
from vllm_plugin import engine_core, hooks, settings
from vllm_plugin.bell import ring
from vllm_plugin.native import NativeCalls
from vllm_plugin.worker import report_to

OLD, NEW = (1, "a" * 32), (2, "b" * 32)


class ModelEngine:
    """Two workers, and timers that tests let run out."""

    def __init__(self) -> None:
        self.index = 0
        self.alone = self.still = True
        self.asleep = False
        self.paused = False
        self.label = "1"
        self.log: list[str] = []
        self.workers: list[dict[str, Any]] = [
            {"state": "ready", "version": OLD[0], "digest": OLD[1], "window": None, "staged": None, "target": None}
            for _ in range(2)
        ]
        self.refusals: dict[str, list[dict[str, Any] | None]] = {}  # by method: the error that each worker answers with
        self.cache_error: Exception | None = None
        self.resume_errors: list[Exception] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def call(self, method: str, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        self.log.append(method)
        answers = []
        for rank, worker in enumerate(self.workers):
            refusal = self.refusals.get(method, [None, None])[rank]
            if refusal is None:
                getattr(self, f"_{method}", lambda worker, *args: None)(worker, *args)
            answers.append({**worker, "error": None} if refusal is None else {"error": refusal})
        return answers

    def _hubsync_commit(self, worker: dict[str, Any], version: int, digest: str) -> None:
        worker |= {"version": version, "digest": digest}

    def _hubsync_open(self, worker: dict[str, Any], version: int, digest: str, token: str) -> None:
        worker["window"] = {"version": version, "digest": digest, "token": token}

    def _hubsync_close(self, worker: dict[str, Any], token: str) -> None:
        worker["window"] = None

    def statuses(self) -> list[dict[str, Any]]:
        return [{"error": None, **worker} for worker in self.workers]

    def on_workers(self, step: str, *args: Any) -> list[dict[str, Any]]:
        if step == "call" and args[0] == "finish_weight_update":
            return self.call("hubsync_commit", *NEW)
        return self.call(args[0] if step == "call" else step)

    def _join(self, worker: dict[str, Any]) -> None:
        worker["state"] = "ready"

    def settle(self) -> None:
        self.log.append("settle")

    def recompute(self) -> None:
        self.log.append("recompute")
        if self.cache_error is not None:
            raise self.cache_error

    def isolate(self) -> None:
        self.log.append("isolate")

    def set_label(self, version: str) -> None:
        self.log.append(f"label {version}")
        self.label = version

    def resume(self) -> None:
        self.log.append("resume")
        if self.resume_errors:
            raise self.resume_errors.pop()
        self.paused = False

    def later(self, seconds: float, turn: Callable[[], None]) -> Callable[[], None]:
        timer = (seconds, turn)
        self.timers.append(timer)
        return lambda: self.timers.remove(timer) if timer in self.timers else None

    def until(self, reached: Callable[[], bool]) -> Future[None] | None:
        for _ in range(10):
            if reached():
                return None
        raise AssertionError("never")

    def ring(self) -> float:
        """Let the next timer run out. Returns its seconds."""
        seconds, turn = self.timers.pop(0)
        turn()
        return seconds


@pytest.fixture
def engine() -> ModelEngine:
    return ModelEngine()


@pytest.fixture
def core(engine: ModelEngine) -> EngineCommit:
    return EngineCommit(engine)


@pytest.fixture
def native(engine: ModelEngine, core: EngineCommit) -> NativeCalls:
    return NativeCalls(engine, core, "keep")  # type: ignore[arg-type]


def refused(kind: str = "ReplicaRefused", message: str = "not staged") -> dict[str, str]:
    return {"type": kind, "message": message}


# --- one turn


@pytest.mark.parametrize(("policy", "caches"), [((), "isolate"), (("recompute",), "recompute"), (("keep",), "isolate")])
def test_caches_weights_and_label_change_in_one_turn(
    core: EngineCommit, engine: ModelEngine, policy: tuple, caches: str
) -> None:
    answers = core.handle("hubsync_commit", *NEW, *policy)
    assert engine.log == ["settle", caches, "hubsync_commit", "label 2"]
    assert [answer["version"] for answer in answers] == [2, 2]
    about = answers[0]["engine"]
    assert (about["index"], about["atomic"], about["label"], about["window_timeout_s"]) == (0, True, "2", 15.0)
    assert about["turn_s"] > 0


def test_nothing_reads_the_weights_of_a_server_that_sleeps(core: EngineCommit, engine: ModelEngine) -> None:
    engine.asleep = True
    for method in ("attach", "join", "stage", "commit", "undo", "heal", "verify"):
        (answer,) = core.handle(f"hubsync_{method}", *NEW)
        assert answer["error"] == {
            "type": "ReplicaRefused",
            "message": "this server sleeps, so its weights cannot be read: wake it up first (POST /wake_up)",
        }
    assert [answer["version"] for answer in core.handle("hubsync_status")] == [1, 1]
    assert engine.log == ["label 1"], "the workers were asked for nothing that has an effect"


def test_the_turn_that_states_a_found_position_labels_it(core: EngineCommit, engine: ModelEngine) -> None:
    engine.label = "default"
    found = [dict(worker) for worker in engine.workers]
    for worker in engine.workers:
        worker |= {"state": "attaching", "version": None, "digest": None}
    assert core.handle("hubsync_status")[0]["engine"]["label"] == "default"
    engine.workers[0] = found[0]
    assert core.handle("hubsync_status")[0]["engine"]["label"] == "default", "one rank does not know its position yet"
    engine.workers[1] = found[1]
    assert core.handle("hubsync_status")[0]["engine"]["label"] == "1"


def test_a_status_answered_before_the_commit_of_another_client_labels_nothing_after_it(
    core: EngineCommit, engine: ModelEngine
) -> None:
    engine.label = "default"
    core.handle("hubsync_status")
    core.handle("hubsync_commit", *NEW)
    assert core.handle("hubsync_status")[0]["engine"]["label"] == "2"
    assert [line for line in engine.log if line.startswith("label")] == ["label 1", "label 2"]


def test_a_label_that_the_owner_has_chosen_stays(core: EngineCommit, engine: ModelEngine) -> None:
    core.handle("hubsync_commit", *NEW)
    engine.label = "step-200"  # `/finish_weight_update` with a weight_version
    core.handle("hubsync_status")
    assert engine.label == "step-200"


def test_an_unknown_policy_is_an_answer(core: EngineCommit, engine: ModelEngine) -> None:
    (answer,) = core.handle("hubsync_commit", *NEW, "maybe")
    assert answer["error"]["type"] == "ConfigError"
    assert engine.log == []


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("hubsync_commit", (1,)), ("hubsync_open", ()), ("hubsync_close", ()), ("hubsync_hold", ())],
)
def test_wrong_arguments_are_an_answer(core: EngineCommit, engine: ModelEngine, method: str, arguments: tuple) -> None:
    (answer,) = core.handle(method, *arguments)
    assert "argument" in answer["error"]["message"]
    assert engine.log == []


def test_a_failed_cache_reset_leaves_the_weights_unchanged(core: EngineCommit, engine: ModelEngine) -> None:
    engine.cache_error = RuntimeError("requests wait for remote blocks")
    (answer,) = core.handle("hubsync_commit", *NEW, "recompute")
    assert "remote blocks" in answer["error"]["message"]
    assert engine.log == ["settle", "recompute"]


def test_a_refused_commit_keeps_the_label(core: EngineCommit, engine: ModelEngine) -> None:
    engine.refusals["hubsync_commit"] = [refused(), refused()]
    assert core.handle("hubsync_commit", *NEW)[0]["error"]["message"] == "not staged"
    assert engine.label == "1"


def test_after_a_failed_write_the_label_is_the_version_of_the_vote(core: EngineCommit, engine: ModelEngine) -> None:
    engine.refusals["hubsync_commit"] = [None, refused("ReplicaPoisoned", "a device error")]
    engine.workers[1] |= {"version": NEW[0], "digest": NEW[1]}  # it will be rebuilt there
    core.handle("hubsync_commit", *NEW)
    assert engine.label == "2"


def test_undoing_and_healing_drop_caches_and_label_too(core: EngineCommit, engine: ModelEngine) -> None:
    for method in ("hubsync_undo", "hubsync_heal"):
        engine.log.clear()
        core.handle(method)
        assert engine.log == ["settle", "recompute", method, "label 1"]


def test_a_commit_needs_a_pause_if_engines_share_forward_passes(core: EngineCommit, engine: ModelEngine) -> None:
    engine.alone = engine.still = False
    (answer,) = core.handle("hubsync_commit", *NEW)
    assert "pause it first" in answer["error"]["message"]
    assert engine.log == []
    core.handle("hubsync_heal")  # only concerns workers that are in no forward pass
    engine.still = True
    assert core.handle("hubsync_commit", *NEW)[0]["error"] is None
    assert engine.label == "2"


# --- watchdog


def test_closing_a_window_in_time_stops_the_watchdog(core: EngineCommit, engine: ModelEngine) -> None:
    core.handle("hubsync_open", *NEW, "token")
    core.handle("hubsync_close", "token")
    assert engine.timers == []


@pytest.mark.parametrize("commits", [True, False])
def test_the_watchdog_ends_an_abandoned_window(core: EngineCommit, engine: ModelEngine, commits: bool) -> None:
    core.handle("hubsync_open", *NEW, "token")
    engine.paused = True
    if commits:
        core.handle("hubsync_commit", *NEW)
    assert engine.ring() == 15.0
    assert engine.log[-2:] == ["resume", "hubsync_close"]
    assert (engine.paused, engine.label) == (False, "2" if commits else "1")
    assert engine.timers == []


def test_a_commit_after_its_window_was_ended_is_refused_with_the_reason(
    core: EngineCommit, engine: ModelEngine
) -> None:
    engine.alone = engine.still = False
    core.handle("hubsync_open", *NEW, "token")
    engine.ring()
    (answer,) = core.handle("hubsync_commit", *NEW)
    assert "was not closed within 15 s" in answer["error"]["message"]
    core.handle("hubsync_open", *NEW, "token")
    (answer,) = core.handle("hubsync_commit", *NEW)
    assert "pause it first" in answer["error"]["message"]


def test_the_watchdog_does_not_resume_an_engine_that_is_not_paused(core: EngineCommit, engine: ModelEngine) -> None:
    core.handle("hubsync_open", *NEW, "token")
    engine.ring()
    assert "resume" not in engine.log
    assert engine.workers[0]["window"] is None


def test_the_watchdog_tries_until_it_succeeds(core: EngineCommit, engine: ModelEngine) -> None:
    core.handle("hubsync_open", *NEW, "token")
    engine.paused, engine.resume_errors = True, [RuntimeError("the pause is still in flight")]
    engine.ring()
    assert engine.paused
    assert engine.ring() == 1.0
    assert not engine.paused


def test_workers_at_different_versions_are_never_resumed(core: EngineCommit, engine: ModelEngine) -> None:
    core.handle("hubsync_open", *NEW, "token")
    engine.paused = True
    engine.workers[1]["version"] = 7
    engine.ring()
    assert engine.paused
    assert len(engine.timers) == 1


def test_a_refused_window_is_not_watched(core: EngineCommit, engine: ModelEngine) -> None:
    core.handle("hubsync_open", *NEW, "mine")
    engine.refusals["hubsync_open"] = [refused(), refused()]
    core.handle("hubsync_open", *NEW, "yours")
    engine.ring()
    assert engine.workers[0]["window"] is None, "it was the first that ran out"


def test_hold_starts_the_watchdog(core: EngineCommit, engine: ModelEngine) -> None:
    core.handle("hubsync_hold", "token")
    engine.paused = True
    engine.ring()
    assert not engine.paused


# --- waiting for background jobs


def test_a_wait_is_answered_when_no_worker_has_a_job(
    core: EngineCommit, engine: ModelEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: Future[None] = Future()
    asked: list[Callable[[], bool]] = []

    def until(reached: Callable[[], bool]) -> Future[None]:
        asked.append(reached)
        return waiting

    monkeypatch.setattr(engine, "until", until)
    engine.workers[1]["busy"] = True
    answers = core.wait(30)
    assert isinstance(answers, Future)
    assert not asked[0]()
    assert not answers.done()
    engine.workers[1] |= {"busy": False, "state": "staged"}
    assert asked[0]()
    waiting.set_result(None)
    assert [answer["state"] for answer in answers.result(0)] == ["ready", "staged"]
    assert all(answer["engine"]["waits"] for answer in answers.result(0))


@pytest.mark.parametrize("seconds", [0, -1, "soon", None])
def test_a_wait_has_an_end(core: EngineCommit, engine: ModelEngine, seconds: Any) -> None:
    engine.workers[0]["busy"] = True
    answers = core.wait(seconds)
    assert not isinstance(answers, Future)
    assert len(answers) == 2


def test_workers_wake_the_loop() -> None:
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    addresses: list[bytes] = []

    def collective_rpc(method: Any, timeout: Any, args: tuple, kwargs: Any) -> list[dict[str, Any]]:
        assert method is report_to
        addresses.append(*args)
        return [{"error": None}]

    core = EngineCore()
    core.input_queue = inbox  # type: ignore[attr-defined]
    engine = engine_core.VLLMEngineCore(core, collective_rpc)
    done = False
    waiting = engine.until(lambda: done)
    assert waiting is not None
    done = True
    ring(addresses[0])
    kind, turn = inbox.get(timeout=60)
    assert kind is engine_core.CoreTurn
    turn()
    assert waiting.done()
    ring(b"\0hubsync-nobody-listens")


# --- the prefix cache


class Block:
    """As vLLM's: in the cache while it has a name."""

    def __init__(self, name: str | None):
        self.name = name

    def reset_hash(self) -> None:
        assert self.name is not None, "tens of thousands of others are not touched"
        self.name = None


class Names:
    """As `BlockHashToBlockMap`."""

    def __init__(self, cache: dict[str, Any] | None = None):
        self._cache = cache or {}


@pytest.mark.parametrize("kind", [Names, dict])
def test_all_blocks_of_the_prefix_cache_are_forgotten(kind: Any) -> None:
    one, two, again, partial, free = (Block(name) for name in ("a", "b", "b", "c", None))
    pool = SimpleNamespace(
        blocks=[one, two, again, partial, free],
        cached_block_hash_to_block=kind({"a": one, "b": {1: two, 2: again}}),
        cached_block_hashes_by_block={3: {"c"}},
        metrics_collector=None,
        enable_kv_cache_events=False,
    )
    engine_core._forget_blocks(pool)
    assert all(block.name is None for block in pool.blocks)
    assert not pool.cached_block_hashes_by_block
    assert type(pool.cached_block_hash_to_block) is kind


# --- vLLM's own calls


def test_vllms_calls_attach_stage_and_commit(native: NativeCalls, engine: ModelEngine) -> None:
    for worker in engine.workers:
        worker["state"] = "mapped"
    assert native.handle("init_weight_transfer_engine", init_info={}) == [None]
    native.handle("start_weight_update")
    for worker in engine.workers:
        worker["target"] = worker["staged"] = {"version": 2, "digest": "b" * 32}
    native.handle("update_weights", update_info={})
    native.handle("finish_weight_update")
    calls = ["init_weight_transfer_engine", "join", "start_weight_update", "update_weights"]
    calls.insert(2, "label 1")  # found by the workers
    assert engine.log == [*calls, "settle", "isolate", "hubsync_commit", "label 2"]


@pytest.mark.parametrize("method", ["update_weights", "finish_weight_update"])
def test_one_worker_error_is_raised_once_and_ends_the_update_on_all(
    native: NativeCalls, engine: ModelEngine, method: str
) -> None:
    step = "hubsync_commit" if method == "finish_weight_update" else method
    engine.refusals[step] = [None, refused("NoPath", "no such version")]
    with pytest.raises(NoPath, match="no such version"):
        native.handle(method)
    assert engine.log[-1] == "abandon"


def test_vllms_calls_are_refused_while_the_server_sleeps(native: NativeCalls, engine: ModelEngine) -> None:
    engine.asleep = True
    with pytest.raises(ReplicaRefused, match="this server sleeps"):
        native.handle("start_weight_update")
    native.handle("shutdown_weight_transfer_engine")


def test_background_errors_of_native_calls_are_raised(native: NativeCalls, engine: ModelEngine) -> None:
    for worker in engine.workers:
        worker["target"] = {"version": 9, "digest": "c" * 32}
    engine.workers[1]["error"] = refused("NoPath", "no such version")
    with pytest.raises(NoPath, match="no such version"):
        native.handle("update_weights")
    assert engine.log[-1] == "abandon"
    engine.workers[0]["state"] = "refused"
    with pytest.raises(NoPath):
        native.handle("init_weight_transfer_engine")


def test_joining_needs_a_pause_if_engines_share_forward_passes(native: NativeCalls, engine: ModelEngine) -> None:
    engine.alone = engine.still = False
    for worker in engine.workers:
        worker["state"] = "mapped"
    with pytest.raises(ReplicaRefused, match="pause it first"):
        native.handle("init_weight_transfer_engine")


# --- hooks


class EngineCore:
    """The attributes of vLLM's engine core that hubsync reads, as in a server of one worker."""

    def __init__(self, **config: Any) -> None:
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_size=1, pipeline_parallel_size=1),
            model_config=SimpleNamespace(is_multimodal_model=False),
            additional_config=config,
        )
        self.batch_queue: list[str] = []
        self._weight_version = "1"

    def set_weight_version(self, version: str) -> None:
        self._weight_version = version

    def collective_rpc(self, method: Any, timeout: Any = None, args: tuple = (), kwargs: Any = None) -> Any:
        return method, args, kwargs

    def attach_weight_version(self, outputs: dict[int, Any]) -> None:
        for output in outputs.values():
            output.weight_version = self._weight_version


def test_batches_that_began_before_a_commit_state_the_old_version() -> None:
    hooks._wrap(EngineCore, "attach_weight_version", hooks._attach_weight_version)
    core = EngineCore()
    engine = engine_core.VLLMEngineCore(core, core.collective_rpc)
    core._hubsync = SimpleNamespace(engine=engine)  # type: ignore[attr-defined]
    core.batch_queue = ["a", "b"]
    engine.set_label("2")
    engine.set_label("3")  # both still in flight
    labels = []
    for _ in range(3):
        output = SimpleNamespace()
        core.attach_weight_version({0: output})
        labels.append(output.weight_version)
    assert labels == ["1", "1", "3"]


def test_requests_of_servers_without_hubsync_pass_through() -> None:
    for _ in range(2):
        hooks._wrap(EngineCore, "collective_rpc", hooks._collective_rpc)
    core = EngineCore()
    assert core.collective_rpc("update_weights", args=(1,)) == ("update_weights", (1,), None)
    assert core.collective_rpc(print) == (print, (), None)
    assert not hasattr(core, "_hubsync")
    assert not hasattr(EngineCore.collective_rpc._hubsync_original, "_hubsync_original")  # type: ignore[attr-defined]


def test_answers_of_all_data_parallel_engines_are_returned() -> None:
    class Client:
        core_engines = ("x", "y")

        async def collective_rpc_async(
            self, method: str, timeout: Any = None, args: tuple = (), kwargs: Any = None
        ) -> Any:
            return "the first engine's"

        async def _call_utility_async(self, call: str, method: str, *args: Any, engine: str) -> list[str]:
            return [f"{call} {method} {engine}{rank}" for rank in range(2)]

    hooks._wrap(Client, "collective_rpc_async", hooks._collective_rpc_async)
    client = Client()
    assert asyncio.run(client.collective_rpc_async("get_model")) == "the first engine's"
    answers = asyncio.run(client.collective_rpc_async("hubsync_status"))
    assert answers == [f"collective_rpc hubsync_status {name}" for name in ("x0", "x1", "y0", "y1")]


@pytest.mark.parametrize(
    ("pinned", "environment", "expected"),
    [
        (None, {}, (15.0, "keep")),
        (None, {"HUBSYNC_WINDOW_TIMEOUT": "2.5", "HUBSYNC_KV_CACHE": "recompute"}, (2.5, "recompute")),
        ({"window_timeout": 3, "kv_cache": "recompute"}, {"HUBSYNC_KV_CACHE": "keep"}, (3.0, "recompute")),
        ({"window_timeout": "soon", "kv_cache": "some"}, {}, (15.0, "keep")),
        (None, {"HUBSYNC_WINDOW_TIMEOUT": "-1"}, (15.0, "keep")),
        (["not", "an", "object"], {}, (15.0, "keep")),
    ],
)
def test_engine_core_settings(pinned: Any, environment: dict, expected: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HUBSYNC_WINDOW_TIMEOUT", "HUBSYNC_KV_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = settings.read_settings(EngineCore(hubsync=pinned).vllm_config)
    assert (found.window_timeout, found.kv_cache) == expected
