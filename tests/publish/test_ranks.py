"""Several ranks publish one model: each its own part, nothing gathered, and the same outcome on all ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader, Plan, Step
from hubsync.chain.replay import View, replay
from hubsync.errors import RankError
from hubsync.format.checkpoint import Checkpoint
from hubsync.publish.detect.snapshot import Snapshot
from hubsync.publish.results import Published
from tests.support.tiny import same_bits
from tests.support.training import Net, device_of, faulty_bucket, run, spread, train, watched, whole_view

pytestmark = pytest.mark.slow

STEPS = 3


def engine_of(how: str, address: str, **settings: Any) -> tuple[Any, Any, DeltaWeightTransferEngine]:
    model = spread(how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, optimizer, DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, **settings))


def outcome(do: Any) -> tuple[str, str] | None:
    """Class and message of the exception that it raises; None for none."""
    try:
        do()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def follow(address: Path, tmp_path: Path) -> View:
    reader = ChainReader(LocalBucket(str(address)), tmp_path / "cache")
    return replay(reader, reader.plan(None))


# --- exact, and without a gather --------------------------------------------------------------------


def publishes(rank: int, address: str, how: str) -> tuple[list[Published], dict[str, torch.Tensor], dict[str, Any]]:
    model, optimizer, engine = engine_of(how, address)
    versions = []
    with engine:
        for step in range(1, STEPS + 1):
            train(model, optimizer, step)
            with watched() as watch:
                versions.append(engine.publish().result())
        seen = {"largest": watch.largest, "collectives": watch.collectives}
        if how != "dtensor":
            with torch.no_grad():  # evaluation leaves some of FSDP2's parameters unsharded
                model(torch.zeros(1, 3, dtype=torch.long, device=device_of(dist.get_world_size())))
            assert engine.publish().result().changed == 0
        return versions, whole_view(model), seen


@pytest.mark.parametrize(
    ("how", "ranks"),
    [("ddp", 2), ("ddp", 3), ("fsdp2", 2), ("fsdp2", 3), ("offload", 2), ("dtensor", 2), ("dtensor", 3), ("hsdp", 4)],
)
def test_a_replica_ends_with_the_trained_weights(how: str, ranks: int, tmp_path: Path) -> None:
    results = run(ranks, publishes, tmp_path / "run", how)
    versions, trained, _ = results[0]
    view = follow(tmp_path / "run", tmp_path)
    assert same_bits(view.tensors, trained)
    assert [version.version for version in versions] == [1, 2, 3]
    assert view.position == versions[-1].position
    for others, also_trained, seen in results[1:]:
        assert [other.position for other in others] == [version.position for version in versions]
        assert same_bits(also_trained, trained)
        assert seen["collectives"].keys() == {"allgather_.default"}  # of outcomes, not of weights
    for version in versions:
        assert [share.rank for share in version.ranks] == list(range(ranks))
        assert sum(share.changed for share in version.ranks) == version.changed
        assert sum(share.payload_bytes for share in version.ranks) == version.payload_bytes
        assert all(share.changed and share.payload_bytes for share in version.ranks)
    for *_, seen in results:
        largest_tensor = trained["embed.weight"].numel()
        assert max(seen["collectives"].values()) < largest_tensor / 4
        assert how == "ddp" or seen["largest"] <= -(-1031 // (2 if how == "hsdp" else ranks)) * 24


def drifts(rank: int, address: str, what: str) -> tuple[tuple[str, str] | None, dict[str, torch.Tensor]]:
    """Ranks whose replicas are no longer equal, in one step of three."""
    model, optimizer, engine = engine_of("ddp", address)
    found = None
    with engine:
        for step in range(1, 4):
            train(model, optimizer, step)
            if what == "a buffer":
                model.module.shift += rank
            if what == "a parameter" and step == 2:
                change = torch.full_like(model.module.up.bias, float(rank))
                model.module.up.bias.data += change
                found = outcome(engine.publish)
                model.module.up.bias.data -= change
            engine.publish().result()
    return found, whole_view(model)


@pytest.mark.parametrize("what", ["a parameter", "a buffer"])
def test_no_version_is_a_mixture_of_ranks(what: str, tmp_path: Path) -> None:
    """Parameters that differ between replicas are refused, at every publish. Buffers are those of the lowest rank."""
    (found, trained), (also_found, other) = run(2, drifts, tmp_path / "run", what)
    assert found == also_found
    if what == "a parameter":
        assert found is not None
        assert found[0] == "ConfigError"
        assert "up.bias differs between ranks 0 and 1, which both hold it, so nothing is published" in found[1]
    else:
        assert not torch.equal(trained["shift"], other["shift"])
    view = follow(tmp_path / "run", tmp_path)
    assert same_bits(view.tensors, trained)
    assert view.position.version == 3


def damages(rank: int, address: str, how: str) -> tuple[list[Published], list[dict[str, torch.Tensor]]]:
    """Another rank's copy is damaged each time, once together with changes and once without."""
    model, optimizer, engine = engine_of(how, address)
    versions, views = [], []
    with engine:
        for step in range(1, 5):
            if step != 2:
                train(model, optimizer, step)
            detector = engine._publisher.detector
            assert isinstance(detector, Snapshot)
            index = detector.table.index_of("embed.weight")
            if rank == step - 1 and len(detector.part(index)):
                detector.part(index)[0] = 3
            versions.append(engine.publish().result())
            views.append(whole_view(model))
    return versions, views


@pytest.mark.parametrize(("how", "ranks"), [("ddp", 2), ("fsdp2", 2), ("dtensor", 3)])
def test_a_damaged_copy_of_one_rank_is_healed_by_new_values(how: str, ranks: int, tmp_path: Path) -> None:
    results = run(ranks, damages, tmp_path / "run", how)
    versions, views = results[0]
    damaged = [step < ranks for step in range(4)]
    assert [version.rewritten == ("embed.weight",) for version in versions] == damaged
    reader = ChainReader(LocalBucket(str(tmp_path / "run")), tmp_path / "cache")
    assert [m.absolute for m in reader.manifests() if m.kind == "delta"] == [int(one) for one in damaged]
    for version, view in zip(versions, views, strict=True):
        assert same_bits(replay(reader, reader.plan(None, version.version)).tensors, view)
    assert all([v.position for v in others] == [v.position for v in versions] for others, _ in results[1:])


def test_replicas_share_the_work(tmp_path: Path) -> None:
    results = run(2, publishes, tmp_path / "run", "ddp")
    first, second = results[0][0][-1].ranks
    assert 0.5 < first.changed / second.changed < 2
    manifests = ChainReader(LocalBucket(str(tmp_path / "run")), tmp_path / "cache").manifests()
    assert [[part.rank for part in m.parts] for m in manifests if m.kind == "delta"] == [[0, 1]] * STEPS


def joins(rank: int, address: str, how: str) -> int:
    with engine_of(how, address)[2] as engine:
        return engine.position.version


def test_a_run_is_resumed_with_another_number_of_ranks(tmp_path: Path) -> None:
    """The same weights in another sharding have the same digest: nothing is uploaded again."""
    for ranks, how in [(2, "fsdp2"), (3, "dtensor")]:
        assert run(ranks, joins, tmp_path / "run", how) == [0] * ranks
    with DeltaWeightTransferEngine(Net(), None, SyncConfig(bucket=str(tmp_path / "run"))) as alone:
        assert alone.position.version == 0
    manifests = ChainReader(LocalBucket(str(tmp_path / "run")), tmp_path / "cache").manifests()
    assert [m.kind for m in manifests] == ["anchor"]  # of version 0, which has no base checkpoint


def anchors(rank: int, address: str, how: str) -> dict[str, torch.Tensor]:
    from hubsync.publish import anchors as anchors_module

    anchors_module._MAX_FILE_BYTES = 2000  # several files, so that ranks take turns
    model, optimizer, engine = engine_of(how, address, anchor_every=1)
    with engine:
        for step in (1, 2):
            train(model, optimizer, step)
            engine.publish()
        assert engine.anchor().position == engine.position
    return whole_view(model)


@pytest.mark.parametrize(("how", "ranks"), [("fsdp2", 3), ("ddp", 2), ("dtensor", 2)])
def test_an_anchor_holds_whole_tensors(how: str, ranks: int, tmp_path: Path) -> None:
    trained, *_ = run(ranks, anchors, tmp_path / "run", how)
    reader = ChainReader(LocalBucket(str(tmp_path / "run")), tmp_path / "cache")
    anchor = reader.manifests()[-1]
    assert (anchor.kind, anchor.version) == ("anchor", 2)
    assert len([part for part in anchor.parts if part.file != "model.safetensors.index.json"]) > 2
    assert same_bits(replay(reader, reader.plan(None)).tensors, trained)
    assert reader.plan(None).deltas == []


# --- the same outcome on all ranks ------------------------------------------------------------------------------------


def fails_once(rank: int, address: str, where: str) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    buckets = faulty_bucket()
    model, optimizer, engine = engine_of("fsdp2", address)
    with engine:
        train(model, optimizer, 1)
        if where == "detect" and rank == 1:
            detect, Snapshot.detect = Snapshot.detect, _out_of_memory  # type: ignore[method-assign]
            error = outcome(lambda: engine.publish())
            Snapshot.detect = detect  # type: ignore[method-assign]
        else:
            if where in ("upload", "foreign") and rank == 1:
                buckets[0].fail("put", error=_Foreign("cannot", "travel") if where == "foreign" else None)
            if where.endswith("commit") and rank == 0:
                buckets[0].fail("commit", when=where.split()[0])
            error = outcome(lambda: engine.publish().result())
        train(model, optimizer, 2)
        return error, engine.publish().result(), whole_view(model)


class _Foreign(Exception):
    """An exception that cannot be pickled."""

    def __init__(self, left: str, right: str):
        super().__init__(f"{left} {right}")


def _out_of_memory(_: Snapshot) -> Any:
    raise torch.OutOfMemoryError("device full")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("detect", ("OutOfMemoryError", "device full")),
        ("upload", ("BucketUnavailable", "injected: before put")),
        ("foreign", ("RankError", "_Foreign: cannot travel")),
        ("before commit", ("BucketUnavailable", "injected: before commit")),
        ("after commit", ("BucketUnavailable", "injected: after commit")),
    ],
)
def test_an_error_of_one_rank_is_raised_on_all_and_loses_no_change(
    where: str, expected: tuple[str, str], tmp_path: Path
) -> None:
    results = run(2, fails_once, tmp_path / "run", where)
    assert [error for error, *_ in results] == [expected, expected]
    (_, published, trained), (_, also_published, _) = results
    assert published.position == also_published.position
    assert same_bits(follow(tmp_path / "run", tmp_path).tensors, trained)


def is_refused(rank: int, address: str, why: str) -> tuple[str, str] | None:
    model: Any = spread("ddp")
    settings = {}
    if why == "compact":
        settings["encoding"] = "compact"
    if rank == 1 and why == "stages":
        model = torch.nn.Linear(2, 2)
    if why == "replicas":  # the replicas differ
        torch.manual_seed(rank)
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    if why == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(model.module, device_id=torch.device(device_of(2)))
    if rank == 1 and why == "adapter":
        model.module.peft_config = {}
    if rank == 1 and why == "optimizer":
        return outcome(lambda: DeltaWeightTransferEngine(model, object(), SyncConfig(bucket=address)))  # type: ignore[arg-type]
    return outcome(lambda: DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address, **settings)))


@pytest.mark.parametrize(
    ("why", "message"),
    [
        ("compact", "use encoding='fast'"),
        ("stages", "rank 1 holds weight where rank 0 holds embed.weight"),
        ("adapter", "PEFT"),
        ("fsdp1", "is sharded by FSDP1, which is not supported: use FSDP2"),
        ("optimizer", "object is not a torch optimizer"),
        ("replicas", "0.weight differs between ranks 0 and 1"),
    ],
)
def test_all_ranks_raise_the_same_config_error(why: str, message: str, tmp_path: Path) -> None:
    first, second = run(2, is_refused, tmp_path / "run", why)
    assert first == second
    assert first[0] == "ConfigError"
    assert message in first[1]
    assert not (tmp_path / "run").exists()


def dies(rank: int, address: str) -> tuple[str, str] | None:
    model, optimizer, engine = engine_of("ddp", address)
    train(model, optimizer, 1)
    if rank == 1:
        os._exit(7)
    return outcome(lambda: engine.publish().result())


def test_a_dead_rank_raises_a_rank_error_on_the_others(tmp_path: Path) -> None:
    error, exit_code = run(2, dies, tmp_path / "run")
    assert exit_code == 7
    assert error is not None
    assert error[0] == RankError.__name__
    assert "another rank of this training has ended" in error[1]


def leaves_with_an_error(rank: int, address: str) -> tuple[str, str] | None:
    def training() -> None:
        model, optimizer, engine = engine_of("fsdp2", address, anchor_at_close=rank == 1)
        with engine:
            train(model, optimizer, 1)
            engine.publish()
            if rank == 1:
                raise ValueError("of the user")

    return outcome(training)


def test_a_rank_that_leaves_with_an_error_does_not_wait_for_the_others(tmp_path: Path) -> None:
    """An anchor would need the other ranks, which are still training."""
    assert run(2, leaves_with_an_error, tmp_path / "run") == [None, ("ValueError", "of the user")]
    assert follow(tmp_path / "run", tmp_path).position.version == 1


# --- servers, and models of transformers ------------------------------------------------------------


def delivers(rank: int, address: str) -> list[Any]:
    from hubsync.replicas import deployment
    from tests.replicas.test_replica import ModelServer

    server = ModelServer()
    deployment.connect = lambda url, *_, **__: server  # type: ignore[assignment, misc]
    model, optimizer, engine = engine_of("ddp", address, base_model="net", servers=["http://one"])
    with engine:
        if rank == 0:
            server.positions = [[engine.run.origin]]
        train(model, optimizer, 1)
        report = engine.sync(1)
        server.refusing = [0]
        train(model, optimizer, 2)
        error = outcome(lambda: engine.sync(2))
        return [report, error, len(server.calls)]


def test_rank_0_calls_servers_and_all_ranks_get_the_outcome(tmp_path: Path) -> None:
    """The server is a model of the worker protocol: a real one is in test_accelerate.py."""
    (report, error, calls), (other_report, other_error, other_calls) = run(2, delivers, tmp_path / "run")
    assert report.commits[0].position == report.published.position
    assert other_report.commits == report.commits
    assert error == other_error
    assert error[0] == "ReplicaRefused"
    assert calls > 0 == other_calls


def trains_language_models(
    rank: int, directory: str, architectures: list[str]
) -> list[tuple[Published, dict[str, torch.Tensor]]]:
    """Each from its checkpoint in `directory`."""
    outcomes = []
    for architecture in architectures:
        model = _sharded_language_model(Path(directory, architecture))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        with DeltaWeightTransferEngine(
            model, optimizer, SyncConfig(bucket=f"{directory}/{architecture}-run")
        ) as engine:
            tokens = torch.arange(20).view(1, -1) + rank
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            published = engine.publish().result()
            anchor = engine.anchor()
            assert anchor.position == published.position
        outcomes.append((published, whole_view(model, tied="lm_head.weight" if "tied" in architecture else "")))
    return outcomes


def _sharded_language_model(base: Path) -> Any:
    import transformers
    from torch.distributed.fsdp import fully_shard

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def test_sharded_language_models_start_from_checkpoints_and_are_anchored_as_checkpoints(tmp_path: Path) -> None:
    """The digests of all shards add up to that of the checkpoint's file, so only the delta is uploaded."""
    transformers = pytest.importorskip("transformers", minversion="5")
    from tests.support.models import save_checkpoint

    architectures = ["qwen3_tied", "qwen3_moe"]
    for architecture in architectures:
        save_checkpoint(architecture, tmp_path / architecture)
    outcomes, _ = run(2, trains_language_models, tmp_path, architectures)
    for architecture, (published, trained) in zip(architectures, outcomes, strict=True):
        reader = ChainReader(LocalBucket(str(tmp_path / f"{architecture}-run")), tmp_path / f"{architecture}-cache")
        assert [manifest.kind for manifest in reader.manifests()] == ["delta", "anchor"]
        delta, anchor = reader.manifests()
        plan = Plan(start=None, anchor=None, base=True, steps=(Step(delta),), target=published.position)
        directory, table = reader.fetch(anchor)[0].parent, reader.run().table
        view = replay(reader, plan, Checkpoint(tmp_path / architecture, table))
        assert same_bits(view.tensors, dict(Checkpoint(directory, table)))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(directory)
        assert same_bits({name: tensor.detach() for name, tensor in loaded.named_parameters()}, trained)


def finds_nothing_to_publish_once_replaced(rank: int, address: str) -> tuple[str, str] | None:
    _, _, old = engine_of("ddp", address)
    _, _, new = engine_of("ddp", address)
    fenced = outcome(old.publish)
    assert new.publish().result().changed == 0
    old.close()
    new.close()
    return fenced


def test_all_ranks_of_a_replaced_training_are_fenced_without_changes(tmp_path: Path) -> None:
    outcomes = run(2, finds_nothing_to_publish_once_replaced, tmp_path / "run")
    assert [kind for kind, _ in outcomes] == ["Fenced", "Fenced"]
