"""The worker extension in real vLLM engines, bit for bit.

Every byte of every parameter and buffer is compared with what vLLM itself loads from the checkpoint of the version: in
one test with a fresh engine, together with what the engine generates; elsewhere, to save time, with a reload.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llvmlite.binding import ffi
from safetensors.torch import load_file, save_file

from hubsync.errors import ReplicaPoisoned
from hubsync.format.manifest import Position
from hubsync.kernels.bits import bits_of
from tests.support.models import CONFIGS, VOCABULARY, save_checkpoint, save_with_draft_layer
from tests.support.on_gpu import ENGINE_OPTIONS
from tests.support.publisher import Publisher, any_bits, small_steps
from tests.support.site import REPORTS_VERSIONS, core_per_worker

pytestmark = pytest.mark.server

PROMPT = {"prompt_token_ids": [int(token) for token in np.random.default_rng(0).integers(0, VOCABULARY, 24)]}


def memory_of(worker: Any) -> dict[str, str]:
    """Hash of every parameter and buffer of the worker's model."""
    model = worker.model_runner.get_model()
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        name: hashlib.sha1(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in named
    }


def memory_with_draft_of(worker: Any) -> dict[str, str]:
    draft = worker.model_runner.get_draft_model()
    named = {
        f"draft.{name}": hashlib.sha1(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in draft.named_parameters(remove_duplicate=False)
    }
    return {**memory_of(worker), **named}


def allocate_between_stages(worker: Any) -> None:
    """vLLM for CPUs does this in a profile run, which it leaves out where there is nothing to compile."""
    worker.model_runner.profile_run()


def load_checkpoint(worker: Any, path: str) -> None:
    """vLLM's own loading, into the weights of a running engine."""
    worker.reload_weights(weights_path=path)


def discard_staged(worker: Any, rank: int) -> None:
    if worker.rank == rank:
        worker._hubsync.served.applier.discard()


def flip_a_bit(worker: Any, index: int) -> None:
    """A write into the embedding that hubsync does not know of."""
    with torch.inference_mode():
        worker.model_runner.get_model().model.embed_tokens.weight.view(torch.int16).view(-1)[index] ^= 1


class Engine:
    """A vLLM engine with the extension, in this process; with several workers, each of those in its own."""

    def __init__(self, checkpoint: Path, **options: Any):
        from vllm import LLM, SamplingParams

        self._sampling = SamplingParams(temperature=0, max_tokens=12, logprobs=3, detokenize=False)
        self.llm = LLM(
            model=str(checkpoint),
            worker_extension_cls="vllm_plugin.DeltaWorkerExtension",
            skip_tokenizer_init=True,
            max_model_len=256,
            max_num_seqs=4,
            dtype="bfloat16",
            seed=0,
            enforce_eager=True,
            **ENGINE_OPTIONS,
            **options,
        )
        if "pipeline_parallel_size" in options:
            self.all(allocate_between_stages)

    def call(self, method: str | Callable, *args: Any) -> Any:
        (answer,) = self.all(method, *args)
        return answer

    def all(self, method: str | Callable, *args: Any) -> list[Any]:
        """The answers of all workers."""
        return self.llm.collective_rpc(method, args=args)

    def memory(self, of: Callable[[Any], dict[str, str]] = memory_of) -> dict[str, str]:
        return {f"{rank}.{name}": bits for rank, memory in enumerate(self.all(of)) for name, bits in memory.items()}

    def generate(self) -> list:
        self.llm.reset_prefix_cache()
        output = self.llm.generate([PROMPT], self._sampling, use_tqdm=False)[0].outputs[0]
        return [
            list(output.token_ids),
            [sorted((token, value.logprob) for token, value in step.items()) for step in output.logprobs],
        ]

    def cached_tokens(self) -> int:
        """How much of a long prompt is found in the prefix cache. Afterwards most of it is there."""
        prompt = {"prompt_token_ids": 8 * PROMPT["prompt_token_ids"]}
        return self.llm.generate([prompt], self._sampling, use_tqdm=False)[0].num_cached_tokens

    def settled(self) -> dict:
        """The status of all workers, once no background thread has anything left to do."""
        deadline = time.monotonic() + 60
        while True:
            statuses = self.all("hubsync_status")
            if not any(status["state"] in ("attaching", "staging", "applied") for status in statuses):
                assert len({(status["state"], status["version"]) for status in statuses}) == 1, statuses
                return statuses[0]
            assert time.monotonic() < deadline, statuses
            time.sleep(0.01)

    def attach(self) -> dict:
        self.all("hubsync_attach")
        if self.settled()["state"] == "mapped":
            self.all("hubsync_join")
        return self.settled()

    def stage(self, position: Position) -> None:
        self.all("hubsync_stage", position.version, position.digest)
        status = self.settled()
        assert status["state"] == "staged", status

    def follow(self, position: Position) -> None:
        self.stage(position)
        answers = self.all("hubsync_commit", position.version, position.digest)
        assert [answer["error"] for answer in answers] == [None] * len(answers), answers
        status = self.settled()
        assert (status["state"], status["version"]) == ("ready", position.version), status

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def _in_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",  # workers in processes of their own do not end by themselves
            "OMP_NUM_THREADS": "1",
            "HUBSYNC_VERIFY_SHARE": "0",  # the test of it says so: the others look at weights that they have damaged
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the functions above travel to workers in other processes
        }.items():
            patch.setenv(key, value)
        # At the start of an engine, vLLM for CPUs visits every module and asks each object for its `__dict__`, which
        # llvmlite's library handle answers with a function. A server starts before numba is imported; these do not.
        ask = ffi._lib_wrapper.__getattr__
        patch.setattr(ffi._lib_wrapper, "__getattr__", lambda self, name: _no_dunder(name) or ask(self, name))
        yield


def _no_dunder(name: str) -> None:
    if name.startswith("__"):
        raise AttributeError(name)


Start = Callable[..., Engine]


@contextmanager
def engines() -> Iterator[Start]:
    """Starts engines of a checkpoint that follow a run, and ends them."""
    started: list[Engine] = []
    with pytest.MonkeyPatch.context() as patch:

        def start(checkpoint: Path, publisher: Publisher, **options: Any) -> Engine:
            patch.setenv("HUBSYNC_BUCKET", publisher.address)
            patch.setenv("HUBSYNC_CACHE", str(publisher.root / "cache"))
            if {"tensor_parallel_size", "pipeline_parallel_size"} & options.keys():
                for name, value in core_per_worker().items():
                    patch.setenv(name, value)
            started.append(Engine(checkpoint, **options))
            return started[-1]

        try:
            yield start
        finally:
            for engine in started:
                engine.close()


@pytest.fixture
def start() -> Iterator[Start]:
    with engines() as start:
        yield start


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path, save_checkpoint("qwen3_tied", tmp_path / "base"))


def assert_exact(publisher: Publisher, engine: Engine, *, compact: bool, fresh: Callable[..., Engine] | None) -> None:
    """Follow two versions, undo one, and compare all memory with that of the versions' checkpoints.

    `fresh` starts another engine, for a comparison that also covers outputs. Without it the engine itself loads the
    checkpoints.
    """
    first = len(publisher.positions)
    original, original_output = engine.memory(), engine.generate()

    engine.follow(publisher.publish(first, small_steps, compact=compact))
    followed, output = engine.memory(), engine.generate()
    assert output != original_output
    assert followed != original
    engine.follow(publisher.publish(first + 1, any_bits))
    wild = engine.memory()
    engine.all("hubsync_undo")
    assert engine.settled()["version"] == first
    assert engine.memory() == followed

    if fresh is None:
        for version, memory in ((first + 1, wild), (first, followed)):
            engine.all(load_checkpoint, str(publisher.checkpoint(version)))
            assert engine.memory() == memory
        return
    other = fresh(publisher.checkpoint(first), publisher)
    assert other.memory() == followed
    assert other.generate() == output
    assert other.attach()["version"] == first
    other.follow(publisher.positions[first + 1])
    assert other.memory() == wild


def attached(start: Start, publisher: Publisher, **options: Any) -> Engine:
    engine = start(publisher.base, publisher, **options)
    status = engine.attach()
    assert (status["state"], status["version"]) == ("ready", 0), status
    return engine


def test_every_byte_and_every_output_equal_those_of_a_fresh_engine(publisher: Publisher, start: Start) -> None:
    assert_exact(publisher, attached(start, publisher), compact=True, fresh=start)


# `make test` has norms that add one and decays that are computed here, and experts in the doctor's tests. vLLM's reload
# leaves experts unpermuted.
@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(
            "gemma3",
            marks=pytest.mark.skipif(not REPORTS_VERSIONS, reason="vLLM 0.27 for CPUs with AMX cannot run it"),
        ),
        pytest.param(
            "falcon_h1",
            marks=pytest.mark.skipif(not REPORTS_VERSIONS, reason="vLLM 0.27 for CPUs with AMX packs convolutions"),
        ),
        *(pytest.param(name, marks=pytest.mark.matrix) for name in CONFIGS if name not in ("gemma3", "qwen3_tied")),
    ],
)
def test_every_byte_equals_what_vllm_loads(architecture: str, tmp_path: Path, start: Start) -> None:
    publisher = Publisher(tmp_path, save_checkpoint(architecture, tmp_path / "base"))
    assert_exact(publisher, attached(start, publisher), compact=True, fresh=None)


# --- several workers. Of a model as small as this one, ranks hold parts that a compact delta does not cut.


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Publisher, Engine]]:
    root = tmp_path_factory.mktemp("ranks")
    publisher = Publisher(root, save_checkpoint("qwen3_tied", root / "base"))
    with engines() as start:
        yield publisher, attached(start, publisher, tensor_parallel_size=2)


def test_one_worker_that_refuses_keeps_all_from_writing(two_ranks: tuple[Publisher, Engine]) -> None:
    publisher, engine = two_ranks
    before, position = engine.memory(), publisher.publish(1, small_steps)
    for refuses in (0, 1):
        engine.stage(position)
        engine.all(discard_staged, refuses)
        answers = engine.all("hubsync_commit", position.version, position.digest)
        assert {answer["error"]["message"].split(":")[0] for answer in answers} == {f"rank {refuses}"}
        assert engine.memory() == before
    engine.follow(position)
    assert engine.memory() != before


def test_tensor_parallel_workers_hold_their_parts_exactly(two_ranks: tuple[Publisher, Engine]) -> None:
    """The tied embedding is split over the ranks."""
    assert_exact(*two_ranks, compact=False, fresh=None)


def test_pipeline_stages_hold_their_parts_exactly(publisher: Publisher, start: Start) -> None:
    """The tied embedding is on both ends of the pipeline."""
    assert_exact(publisher, attached(start, publisher, pipeline_parallel_size=2), compact=False, fresh=None)


# --- special cases


def test_draft_layers_of_the_checkpoint_follow(tmp_path: Path, start: Start) -> None:
    publisher = Publisher(tmp_path, save_with_draft_layer(tmp_path / "base"))
    speculative = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}, "block_size": 32}
    engine = start(publisher.base, publisher, **speculative)
    assert engine.attach()["state"] == "ready"
    assert engine.cached_tokens() == 0
    assert engine.cached_tokens() > 0
    engine.follow(publisher.publish(1, small_steps))
    assert engine.cached_tokens() == 0, "neither layers nor draft layers find keys and values of old weights"
    fresh = start(publisher.checkpoint(1), publisher, **speculative)
    assert engine.memory(memory_with_draft_of) == fresh.memory(memory_with_draft_of)
    assert engine.generate() == fresh.generate()


def test_wrong_weights_never_run(publisher: Publisher, start: Start) -> None:
    engine = start(publisher.base, publisher)
    engine.call("hubsync_attach")
    engine.settled()
    engine.generate()

    def commit_over_a_flipped_bit(version: int) -> None:
        """The bit is one that the delta does not touch, so only the digest of all weights can see it."""
        position = publisher.publish(version, small_steps)
        old, new = (bits_of(view["model.embed_tokens.weight"]) for view in publisher.views[-2:])
        engine.call(flip_a_bit, int(np.flatnonzero(old == new)[0]))
        engine.call("hubsync_stage", version, position.digest)
        assert engine.settled()["state"] == "staged"
        assert engine.call("hubsync_commit", version, position.digest)["error"] is None
        assert engine.settled()["state"] == "poisoned"

    commit_over_a_flipped_bit(1)
    assert engine.call("hubsync_undo")["error"]["type"] == "ReplicaPoisoned"
    output = engine.generate()  # waits until the weights are right
    status = engine.settled()
    assert (status["state"], status["version"], status["metrics"]["heals"]) == ("ready", 1, 1)
    healed = engine.memory()
    engine.call(load_checkpoint, str(publisher.checkpoint(1)))
    assert engine.memory() == healed
    assert engine.generate() == output
    assert engine.settled()["metrics"]["heals"] == 1, "what vLLM has loaded is verified, and the same"

    (publisher.base / "model.safetensors").unlink()
    commit_over_a_flipped_bit(2)
    with pytest.raises(ReplicaPoisoned, match=r"refusing to run the model: .* version 2 .*embed_tokens.weight differs"):
        engine.generate()


def test_whatever_vllm_does_to_weights_is_verified_before_the_next_forward_pass(
    publisher: Publisher, start: Start
) -> None:
    """On a CPU vLLM ignores sleep: the weights stay right, so they are verified and not rebuilt."""
    engine = start(publisher.base, publisher)
    engine.attach()
    engine.follow(publisher.publish(1, small_steps))
    followed, output = engine.memory(), engine.generate()
    looks = engine.settled()["verification"]
    assert (looks["verified"], looks["share"], looks["healed"]) == (True, 0.0, None)

    def does(act: Callable[[Any], object], healed: int) -> None:
        engine.call(act)
        assert engine.generate() == output
        status = engine.settled()
        assert (status["state"], status["version"], status["metrics"].get("heals", 0)) == ("ready", 1, healed)
        assert status["verification"]["pending"] is None
        assert engine.memory() == followed

    for level in (1, 2):
        does(lambda worker, level=level: (worker.sleep(level), worker.wake_up())[0], 0)  # type: ignore[misc]
    does(lambda worker: worker.sleep(2), 0)  # a forward pass without waking up
    does(lambda worker: worker.reload_weights(), 1)  # those of the first checkpoint
    assert "differ" in engine.settled()["verification"]["healed"]
    does(load_other_weights, 2)
    if hasattr(engine.call(type_of), "reset_weights"):
        does(lambda worker: worker.reset_weights(), 3)


def type_of(worker: Any) -> type:
    return type(worker)


def load_other_weights(worker: Any) -> None:
    """What extensions of other frameworks do."""
    model = worker.model_runner.get_model()
    name = "model.layers.0.mlp.down_proj.weight"
    shape = dict(model.named_parameters())[name].shape
    model.load_weights([(name, torch.ones(shape, dtype=torch.bfloat16))])


def test_a_bit_that_flips_while_nothing_is_staged_is_found(
    publisher: Publisher, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In idle moments, and when a client asks."""
    monkeypatch.delenv("HUBSYNC_VERIFY_SHARE")
    engine = attached(start, publisher)
    output = engine.generate()
    engine.call(flip_a_bit, 11)
    deadline = time.monotonic() + 120
    while (status := engine.call("hubsync_status"))["state"] != "poisoned":
        assert time.monotonic() < deadline, status
        time.sleep(0.1)
    assert status["error"]["message"].endswith("model.embed_tokens.weight differs")
    assert engine.generate() == output
    assert engine.settled()["metrics"]["heals"] == 1

    asked = engine.call("hubsync_verify")["verification"]["asked"]
    while (looks := engine.call("hubsync_status")["verification"])["answered"] < asked:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert looks["verified"]


def test_requests_never_raise(publisher: Publisher, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(publisher.base, publisher)
    monkeypatch.delenv("HUBSYNC_BUCKET")
    engine.call("hubsync_status")  # starts to attach in the background
    status = engine.settled()
    assert (status["state"], status["error"]["type"]) == ("refused", "ConfigError")
    assert "HUBSYNC_BUCKET" in status["error"]["message"]
    assert status["protocol"] == 1
    digest = publisher.positions[0].digest
    for method, arguments, error in [
        ("hubsync_stage", (1, digest), "ConfigError"),
        ("hubsync_commit", (1, digest), "ReplicaRefused"),
        ("hubsync_open", (1, digest, "token"), "ConfigError"),
        ("hubsync_undo", (), "ReplicaRefused"),
        ("hubsync_heal", (), "ConfigError"),
        ("hubsync_stage", ("1", digest), "FormatError"),
        ("hubsync_stage", (1, "../../etc/passwd"), "FormatError"),
        ("hubsync_open", (1, digest, "a token\n"), "FormatError"),
        ("hubsync_stage", (), "ReplicaError"),
    ]:
        assert engine.call(method, *arguments)["error"]["type"] == error, method
    assert engine.call("hubsync_close", "token")["window"] is None

    monkeypatch.setenv("HUBSYNC_BUCKET", publisher.address)
    engine.call("hubsync_attach")
    assert engine.settled()["state"] == "ready"
    assert engine.call("hubsync_stage", 7, digest)["error"] is None
    assert engine.settled()["error"]["type"] == "NoPath"
    assert engine.call("hubsync_open", 0, digest, "token")["error"] is None, "an old error is not this request's"


def test_a_redundant_head_that_vllm_ties_is_refused_by_name(tmp_path: Path, start: Start) -> None:
    """vLLM ties a redundant lm_head to the embedding, so a version in which they differ could not be served."""
    tied = save_checkpoint("qwen3_tied", tmp_path / "tied")
    tensors = load_file(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tied / "model.safetensors", {"format": "pt"})
    publisher = Publisher(tmp_path, tied)
    engine = start(tied, publisher)
    engine.call("hubsync_attach")
    status = engine.settled()
    assert (status["state"], status["error"]["type"]) == ("refused", "ReplicaRefused")
    assert status["error"]["message"].startswith("lm_head.weight: the model's load_weights ignores it")
