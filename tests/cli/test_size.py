"""`hubsync size`: its formulas against real weights, updates and deltas."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.codec import Hubsync, patch_of
from benchmarks.snapshots import synthetic_pair
from hubsync.cli.size import link
from hubsync.cli.sizing import ROUND_TRIPS, DeltaSize, bits_per_change, changed_share, normal_weights, times
from hubsync.errors import ConfigError
from hubsync.format.encoding import Encoding
from tests.support.commands import hubsync

PAGES = Path(__file__).parents[2] / "docs"


def masters(numel: int = 2_000_000) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("update", [1e-7, 3e-7, 1e-6, 1e-5])
def test_an_update_changes_the_computed_share_of_bf16_patterns(update: float) -> None:
    old = masters()
    new = old + update * torch.randn(old.shape).sign()
    changed = (old.bfloat16().view(torch.int16) != new.bfloat16().view(torch.int16)).float().mean().item()
    assert changed_share(normal_weights(old.numel()), update) == pytest.approx(changed, rel=0.02)


@pytest.mark.parametrize(
    ("changed", "encoding", "measured"),
    [
        (0.0119, Encoding.FAST, 9.76),  # benchmarks/README.md: a trace of GRPO
        (0.0119, Encoding.COMPACT, 6.83),
        (0.0082, Encoding.FAST, 10.20),  # Qwen3-4B on an H200
        (0.0082, Encoding.COMPACT, 6.80),
    ],
)
def test_bits_for_a_change_are_those_that_were_measured(changed: float, encoding: Encoding, measured: float) -> None:
    assert bits_per_change(changed, encoding) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("encoding", [Encoding.FAST, Encoding.COMPACT])
@pytest.mark.parametrize("update", [2e-7, 1e-6])
def test_bits_for_a_change_are_those_of_real_deltas(update: float, encoding: Encoding) -> None:
    """Small tensors take more of tables and headers than large ones."""
    pair = synthetic_pair(layers=1, width=512, update=update)
    changed = sum(len(delta.indices) for delta in patch_of(pair).values())
    bits = 8 * len(Hubsync(encoding).encode(pair)) / changed
    assert bits_per_change(changed / pair.table.numel, encoding) == pytest.approx(bits, rel=0.06)


def test_the_time_of_the_measured_sync_is_the_measured_one() -> None:
    """180 ms on one H200, with a bucket in a directory."""
    sync = times(4_020_000_000, DeltaSize(26e6 / 4.02e9, 10.2, 33_200_000), link=1e15, round_trip=0)
    assert sync.total == pytest.approx(0.180, rel=0.02)


def test_above_the_crossing_all_weights_are_faster() -> None:
    delta = DeltaSize(0.01, 10.0, 10_000_000)
    crossing = times(800_000_000, delta, link=1e9, round_trip=0.05).crossing
    below, above = (times(800_000_000, delta, speed * crossing, 0.05) for speed in (0.99, 1.01))
    assert below.total < below.whole
    assert above.total > above.whole


def test_reads_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"w": masters().bfloat16().view(1000, 2000), "ids": torch.arange(5)}, tmp_path / "model.safetensors")
    assert hubsync("size", tmp_path, "--json") == 0
    read = json.loads(capsys.readouterr().out)
    assert hubsync("size", "2M", "--json") == 0
    computed = json.loads(capsys.readouterr().out)
    assert read["parameters"] == computed["parameters"] == 2_000_000
    for step in ("first step", "later steps"):
        assert read[step]["fast"]["changed"] == pytest.approx(computed[step]["fast"]["changed"], rel=0.05)


def test_the_pages_state_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    command, _, block = (PAGES / "sizing.md").read_text().partition("$ hubsync ")[2].partition("\n")
    assert hubsync(*command.split()) == 0
    assert block.startswith(capsys.readouterr().out)
    assert f"+ {ROUND_TRIPS} t + C" in (PAGES / "choosing.md").read_text()


def test_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert hubsync("size", "8B", "--lr", "1e-6", "--link", "10Gb/s") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8,000,000,000 parameters, 16.0 GB in bf16; learning rate 1e-06"
    assert [line.split()[0] for line in lines[3:]][:3] == ["changed", "delta,", "delta,"]


@pytest.mark.parametrize("model", ["nowhere", "0B", "-1"])
def test_refuses_what_is_no_model(model: str) -> None:
    with pytest.raises(ConfigError, match="neither a directory nor a number of parameters"):
        hubsync("size", "--", model)


def test_refuses_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no weights in safetensors files"):
        hubsync("size", tmp_path)


@pytest.mark.parametrize(
    ("text", "speed"), [("1Gb/s", 1e9), ("100 Mbit/s", 1e8), ("125MB/s", 1e9), ("2.5Gbps", 2.5e9), ("10b/s", 10)]
)
def test_reads_speeds(text: str, speed: float) -> None:
    assert link(text) == speed


@pytest.mark.parametrize("text", ["fast", "1G", "0Gb/s", "1Gb"])
def test_refuses_what_is_no_speed(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a speed"):
        link(text)
