"""`benchmarks.gpu` on a CPU, where it only shows that the benchmark works. Figures come from GPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import stage, trainer
from benchmarks.gpu.models import SIZES
from benchmarks.gpu.rows import Results, Row
from hubsync.format.encoding import Encoding


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_shapes_are_those_of_the_model_that_is_trained_and_served(name: str) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SIZES[name].config())
    assert sorted(SIZES[name].shapes) == sorted(tuple(parameter.shape) for parameter in model.parameters())


def test_known_sizes_are_those_of_the_models() -> None:
    billions = {name: round(size.numel / 1e9, 1) for name, size in SIZES.items() if "tiny" not in name}
    assert billions == {"0.6b": 0.6, "4b": 4.0, "8b": 8.2, "moe": 5.9}


def test_parts_of_one_process_print_their_rows() -> None:
    rows = [*trainer.measure(SIZES["tiny"], 1), *stage.measure(SIZES["tiny"], 1, Encoding.FAST)]
    names = {row.name.strip() for row in rows}
    assert {"sliced: followed step", "publish call", "fast: stage", "fast: commit", "fast: verify"} <= names
    assert all(row.value > 0 for row in rows if row.unit == "ms")


def test_results_are_kept_and_a_failing_part_does_not_end_the_others(tmp_path: Path) -> None:
    results = Results("tiny", tmp_path / "results.json")
    results.run("trainer", [Row("parameters", 1000.0, "M")])
    results.run("peers", (1 / 0 for _ in "x"))

    again = Results("tiny", tmp_path / "results.json")
    again.run("server", [Row("publish to committed", 160.0, "ms", "a note")])

    text = again.markdown()
    assert "| publish to committed | 160 ms | a note |" in text
    assert "ZeroDivisionError" in text
    assert "quicker above 100 Gb/s" in text
    assert again.failed == ["peers"]
    with pytest.raises(SystemExit, match="another size"):
        Results("4b", tmp_path / "results.json")


@pytest.mark.long
@pytest.mark.server
@pytest.mark.parametrize("size", ["tiny", "tiny-moe"])
def test_every_part_runs_with_real_servers(size: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--size", size, "--json", str(tmp_path / "results.json")]
    command += ["--repeats", "1", "--syncs", "1", "--streams", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "publish to committed" in done.stdout
