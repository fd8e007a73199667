"""The levels of the codec, from the trainer's setting to a replayed view."""

from __future__ import annotations

import logging
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
from hubsync.publish.level import LevelChooser
from tests.publish.test_engine import Tiny, same_bits, train, view_of


def published(tmp_path: Path, encoding: str, versions: int = 4) -> tuple[ChainReader, Tiny, list[str]]:
    torch.manual_seed(0)
    model = Tiny(64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    levels = []
    config = SyncConfig(str(tmp_path / "bucket"), encoding=encoding, detector="snapshot")  # compact needs a copy
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        for _ in range(versions):
            train(model, optimizer)
            levels.append(engine.publish().result().encoding)
    return ChainReader(LocalBucket(tmp_path / "bucket"), tmp_path / "cache"), model, levels


@pytest.mark.parametrize(
    ("encoding", "levels"), [("fast", ["fast"] * 4), ("compact", ["compact"] * 4), ("auto", ["fast", "compact"])]
)
def test_a_run_of_any_level_is_replayed_bit_for_bit(tmp_path: Path, encoding: str, levels: list[str]) -> None:
    reader, model, used = published(tmp_path, encoding)
    assert used[: len(levels)] == levels
    assert [manifest.encoding for manifest in reader.manifests() if manifest.kind == "delta"] == used
    assert same_bits(replay(reader, reader.plan(None)).tensors, view_of(model))


def test_several_compact_deltas_are_merged_into_one_patch_of_the_weights_they_start_from(tmp_path: Path) -> None:
    reader, model, _ = published(tmp_path, "compact")
    start = replay(reader, reader.plan(None, 1))
    plan = reader.plan(start.position)
    assert len(plan.deltas) == 3
    patch = reader.merged(plan.steps, ViewBits(start.table, start.tensors))
    patched = Patched(start.tensors, start.table, patch)
    assert same_bits({name: patched[name] for name in patched}, view_of(model))


def test_compact_deltas_without_the_weights_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    reader, _, _ = published(tmp_path, "compact", 1)
    with pytest.raises(ConfigError, match="give them as `old`"):
        reader.patch(reader.manifest(1))


def learned(seconds_per_byte: float) -> LevelChooser:
    """ "auto" after one version of each level: compact is 3 bits a change smaller and takes 20 ns a change longer."""
    chooser = LevelChooser("auto")
    for level, encode_s, nbytes in [("fast", 0.01, 1_250_000), ("compact", 0.03, 875_000)]:
        assert chooser.choose() == level
        chooser.learn(level, 1_000_000, nbytes, encode_s, nbytes * seconds_per_byte)
    return chooser


@pytest.mark.parametrize(("seconds_per_byte", "level"), [(1e-6, "compact"), (1e-9, "fast")])
def test_auto_measures_both_levels_and_takes_what_is_sooner_at_the_other_end(
    seconds_per_byte: float, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    chooser = learned(seconds_per_byte)
    with caplog.at_level(logging.INFO):
        assert [chooser.choose() for _ in range(3)] == [level] * 3
    assert len(caplog.records) == 1
    assert f"encoding=auto: {level} from now on" in caplog.text


def test_auto_follows_a_link_that_becomes_faster() -> None:
    chooser = learned(1e-6)
    assert chooser.choose() == "compact"
    for _ in range(30):
        chooser.learn("compact", 1_000_000, 875_000, 0.03, 875_000 * 1e-9)
    assert chooser.choose() == "fast"
