"""The encodings, from the trainer's setting to a replayed view."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.chain.replay import replay
from hubsync.errors import ConfigError
from hubsync.format.checkpoint import Patched
from hubsync.format.view_bits import ViewBits
from tests.support.tiny import Tiny, same_bits, train, view_of


def published(tmp_path: Path, encoding: str, versions: int = 4) -> tuple[ChainReader, Tiny, list[str]]:
    torch.manual_seed(0)
    model = Tiny(64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    encodings = []
    config = SyncConfig(str(tmp_path / "bucket"), encoding=encoding, detector="snapshot")  # compact needs a copy
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        for _ in range(versions):
            train(model, optimizer)
            encodings.append(engine.publish().result().encoding)
    return ChainReader(LocalBucket(tmp_path / "bucket"), tmp_path / "cache"), model, encodings


@pytest.mark.parametrize("encoding", ["fast", "compact"])
def test_a_run_of_each_encoding_replays_bit_for_bit(tmp_path: Path, encoding: str) -> None:
    reader, model, used = published(tmp_path, encoding)
    assert used == [encoding] * 4
    assert [manifest.encoding for manifest in reader.manifests() if manifest.kind == "delta"] == used
    assert same_bits(replay(reader, reader.plan(None)).tensors, view_of(model))


def test_compact_deltas_merge_into_one_patch_of_their_start(tmp_path: Path) -> None:
    reader, model, _ = published(tmp_path, "compact")
    start = replay(reader, reader.plan(None, 1))
    plan = reader.plan(start.position)
    assert len(plan.deltas) == 3
    patch = reader.merged(plan.steps, ViewBits(start.table, start.tensors))
    patched = Patched(start.tensors, start.table, patch)
    assert same_bits({name: patched[name] for name in patched}, view_of(model))


def test_decoding_a_compact_delta_without_weights_names_the_remedy(tmp_path: Path) -> None:
    reader, _, _ = published(tmp_path, "compact", 1)
    with pytest.raises(ConfigError, match="give them as `old`"):
        reader.patch(reader.manifest(1))
