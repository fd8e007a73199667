"""Anchors: their contents, their schedule, and their failures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader, Compactor
from hubsync.errors import (
    BucketError,
)
from tests.support.faults import FaultyBucket
from tests.support.tiny import Tiny, follow, same_bits, train, view_of


def test_a_model_without_a_base_checkpoint_is_uploaded_once(model: Tiny, address: str, tmp_path: Path) -> None:
    DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)).close()
    assert same_bits(follow(address, tmp_path).tensors, view_of(model))


def test_the_next_engine_uploads_version_0_if_the_creator_died_before(
    model: Tiny, address: str, tmp_path: Path, faulty: list[FaultyBucket]
) -> None:
    commit = FaultyBucket.commit

    def die_at_the_anchor(self: FaultyBucket, path: str, data: bytes) -> None:
        if "anchors" in path:
            raise KeyboardInterrupt
        commit(self, path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FaultyBucket, "commit", die_at_the_anchor)
        with pytest.raises(KeyboardInterrupt):
            DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address))
    DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)).close()
    assert same_bits(follow(address, tmp_path).tensors, view_of(model))


def test_an_anchor_holds_the_published_weights_not_the_trained_ones(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, base_model="tiny")) as engine:
        train(model, optimizer)
        published = engine.publish(1).result()
        view = view_of(model)
        train(model, optimizer)
        manifest = engine.anchor()
        assert manifest.position == published.position
        assert engine.anchor() == manifest
    assert same_bits(follow(address, tmp_path).tensors, view)


def test_anchors_are_uploaded_every_n_versions_and_at_close(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    config = SyncConfig(bucket=address, base_model="tiny", anchor_every=2, anchor_at_close=True)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        for step in range(5):
            train(model, optimizer)
            engine.publish(step)
    manifests = ChainReader(LocalBucket(address), tmp_path / "cache").manifests()
    assert [manifest.version for manifest in manifests if manifest.kind == "anchor"] == [2, 4, 5]


def test_an_anchor_is_uploaded_once_deltas_exceed_a_fraction_of_it(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    config = SyncConfig(bucket=address, base_model="tiny", anchor_fraction=10.0)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        dense, sizes = engine.run.table.nbytes, []
        while sum(sizes) <= 10 * dense:
            train(model, optimizer)
            sizes.append(engine.publish().result().payload_bytes)
            assert sum(sizes[:-1]) <= 10 * dense
        train(model, optimizer)
        engine.publish()
    manifests = ChainReader(LocalBucket(address), tmp_path / "cache").manifests()
    assert [manifest.version for manifest in manifests if manifest.kind == "anchor"] == [len(sizes)]


def test_merged_deltas_delay_an_anchor(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path
) -> None:
    bucket, cache = LocalBucket(address, create=True), tmp_path / "cache"
    config = SyncConfig(bucket=address, base_model="tiny", anchor_fraction=10.0)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        spent = 0
        while spent <= 20 * engine.run.table.nbytes:
            train(model, optimizer)
            spent += engine.publish().result().payload_bytes
            engine.wait()
            list(Compactor(bucket, ChainReader(bucket, cache)).run())
    assert {manifest.kind for manifest in ChainReader(bucket, cache).manifests()} == {"delta"}


def test_a_failed_anchor_is_retried_and_does_not_stop_publishing(
    model: Tiny, optimizer: torch.optim.Optimizer, address: str, tmp_path: Path, faulty: list[FaultyBucket]
) -> None:
    config = SyncConfig(bucket=address, base_model="tiny", anchor_every=2)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        for step in range(3):
            if step == 1:
                faulty[0].fail("commit", 3, when="before")  # manifest, head, then the anchor's manifest
            train(model, optimizer)
            engine.publish(step).result()
            engine.wait()
    reader = ChainReader(LocalBucket(address), tmp_path / "cache")
    assert [m.version for m in reader.manifests() if m.kind == "anchor"] == [reader.newest().version]


def test_an_anchor_that_does_not_fit_on_disk_does_not_stop_publishing(
    model: Tiny, address: str, tmp_path: Path
) -> None:
    class FullDisk:
        def save_pretrained(self, directory: Path) -> None:
            raise OSError(28, "No space left on device")

    config = SyncConfig(bucket=address, base_model="tiny", anchor_every=1)
    base = view_of(model)
    with DeltaWeightTransferEngine(model, None, config, processing_class=FullDisk()) as engine:
        for step in range(3):
            torch.nn.init.normal_(model.layers[0].weight)  # type: ignore[arg-type]
            assert engine.publish(step).result().version == step + 1
    assert same_bits(follow(address, tmp_path, base=base).tensors, view_of(model))


def test_a_full_disk_error_names_tmpdir(
    model: Tiny, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        with torch.no_grad():
            model.scale += 1
        engine.sync()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
        with pytest.raises(BucketError, match="TMPDIR"):
            engine.anchor()
        monkeypatch.undo()
        assert engine.anchor().position == engine.position


@pytest.mark.parametrize("compiled", [False, True])
def test_a_transformers_model_is_anchored_as_a_loadable_checkpoint(
    compiled: bool, address: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    trained = torch.compile(model) if compiled else model
    with DeltaWeightTransferEngine(trained, None, SyncConfig(bucket=address)) as engine:
        reader = ChainReader(LocalBucket(address), tmp_path / "cache")
        directory = reader.fetch(engine.anchor())[0].parent
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config.architectures == ["Qwen3ForCausalLM"]
    assert same_bits(view_of(loaded), view_of(model))
    with DeltaWeightTransferEngine(loaded, None, SyncConfig(bucket=str(tmp_path / "next"))) as engine:
        assert engine.run.base.model == str(directory.resolve())
    with torch.no_grad():
        loaded.model.norm.weight[0] += 1
    with DeltaWeightTransferEngine(loaded, None, SyncConfig(bucket=str(tmp_path / "trained"))) as engine:
        assert engine.run.base.model is None  # that checkpoint is not what is trained: it is uploaded instead
    assert same_bits(follow(str(tmp_path / "trained"), tmp_path).tensors, view_of(loaded))
