"""`hubsync doctor`: its report, and its verdict on real vLLM engines."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hubsync.cli import doctor
from hubsync.cli.main import main
from hubsync.doctor import diagnosis
from hubsync.doctor.diagnosis import TensorReport
from hubsync.doctor.random_model import make_random_checkpoint
from hubsync.doctor.report import folded
from hubsync.doctor.trial import make_trial, random_patch
from hubsync.errors import ConfigError
from hubsync.format.parts import open_anchor
from hubsync.kernels.bits import bits_of
from tests.support import matrix
from tests.support.models import CONFIGS, EXPERTS, MIXED, MORE, save_checkpoint
from tests.support.on_gpu import DEVICE
from tests.support.toy import TABLE, view
from tests.support.vision_models import ALL_VISION, HAS_TORCHVISION, VISION, save_vision_checkpoint
from tests.support.warm import run_warm

needs_torchvision = pytest.mark.skipif(not HAS_TORCHVISION, reason="needs torchvision: make test-matrix")

# On CPUs with AMX, vLLM keeps only packed weights of latent attention, unless this backend is chosen.
LATENT = ["--attention-backend", "CPU_MLA"]


def options(architecture: str) -> list[str]:
    latent = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2")
    return LATENT if DEVICE == "cpu" and architecture in latent else []


# --- the trial ----------------------------------------------------------------------------------------


def test_a_trial_changes_1_percent_of_each_tensor_by_small_steps_and_to_any_pattern() -> None:
    tensors = {name: tensor.repeat(*[50] * max(1, tensor.ndim)) for name, tensor in view(0).items()}
    table = type(TABLE)([type(spec)(spec.name, tuple(tensors[spec.name].shape), spec.dtype) for spec in TABLE])
    patch = random_patch(table, tensors, seed=1)
    assert patch.keys() == set(range(len(table)))
    for index, delta in patch.items():
        assert 0.5 < len(delta) / max(1, table[index].numel // 100) <= 1
    steps = np.abs(patch[0].diffs.astype(np.int64))
    assert 0.3 < (steps <= 3).mean() < 0.7


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    save_file(
        {"b": torch.randn(400, 3).bfloat16(), "a": torch.randn(200)}, directory / "model.safetensors", {"format": "pt"}
    )
    (directory / "config.json").write_text("{}")
    return directory


def test_the_patched_checkpoint_is_version_one(checkpoint: Path, tmp_path: Path) -> None:
    trial = make_trial(checkpoint, tmp_path)
    patched = open_anchor(list(trial.patched.glob("*.safetensors")), trial.table)
    base = load_file(checkpoint / "model.safetensors")
    changed = sum(int((bits_of(base[spec.name]) != bits_of(patched[spec.name])).sum()) for spec in trial.table)
    assert changed == trial.changed > 0
    assert (trial.patched / "config.json").is_file()


# --- report and exit code -----------------------------------------------------------------------


def fake(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Replace the two engines by their reports, because real engines cannot be made to fail on purpose."""
    layout = {"tensors": {name: {"class": "affine", "elements": 1, "reason": None} for name in "ab"}, "derived": ["v"]}
    follows = {
        "memory": [{"w": "old"}],
        "followed": [{"w": "new"}],
        "undone": [{"w": "old"}],
        "layout": [layout],
        "error": None,
        "load_s": 1.0,
        "seconds": {"commit": 0.5},
        **changes,
    }
    answers = iter([follows, {"memory": [{"w": "new"}], "error": None}])
    monkeypatch.setattr(diagnosis, "_run", lambda *_: next(answers))


def run(checkpoint: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["doctor", str(checkpoint), *arguments])
    captured = capsys.readouterr()
    return code, " ".join((captured.out + captured.err).split())


def test_an_exact_model_is_a_yes(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch)
    code, text = run(checkpoint, capsys)
    assert code == 0
    assert "recomputed after each commit: v" in text
    assert "Yes: this model can be synced exactly" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"followed": [{"w": "wrong"}]}, "0 of 1 tensors of the served model equal a fresh load"),
        ({"undone": [{"w": "wrong"}]}, "0 of 1 tensors of the served model equal the original weights after the undo"),
        ({"followed": [{"w": "new", "lost": "x"}]}, "differs: rank 0: lost"),
        ({"error": {"type": "ReplicaRefused", "message": "a: why"}}, "No. ReplicaRefused: a: why"),
    ],
)
def test_any_difference_is_a_no(
    changes: dict[str, Any],
    words: str,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake(monkeypatch, **changes)
    code, text = run(checkpoint, capsys)
    assert code == 1
    assert words in text
    fake(monkeypatch, **changes)
    code, text = run(checkpoint, capsys, "--json")
    assert code == 1
    assert json.loads(text)["exact"] is False


def test_a_directory_without_a_checkpoint_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(tmp_path, capsys)
    assert code == 1
    assert "holds no safetensors checkpoint: download the model first" in text


def test_without_vllm_the_error_names_what_to_install(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, text = run(checkpoint, capsys)
    assert code == 1
    assert "pip install vllm" in text


def test_layers_and_experts_are_folded() -> None:
    reports = [
        TensorReport(f"layers.{layer}.experts.{expert}.w1.weight", "affine", None, 1)
        for layer in range(2)
        for expert in range(3)
    ]
    odd = TensorReport("layers.1.experts.9.w1.weight", "refused", "why", 0)
    rows = [(name, kind, len(found)) for name, kind, found in folded([*reports, odd])]
    assert rows == [("layers.*.experts.*.w1.weight", "affine", 6), ("layers.*.experts.*.w1.weight", "refused", 1)]


# --- on real engines ----------------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.matrix
def test_a_model_that_vllm_cannot_load_shows_the_output_of_vllm(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run(checkpoint, capsys)
    assert code == 1
    assert "vLLM ended with code 1" in text


@pytest.mark.server
def test_a_refusal_names_the_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_checkpoint("qwen3_tied", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    code, text = run(base, capsys)
    assert code == 1
    assert "No. ReplicaRefused: lm_head.weight: the model's load_weights ignores it" in text


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are forked from a process that has imported vLLM."""
    monkeypatch.setattr(diagnosis, "_finished", run_warm)


@pytest.fixture
def diagnosed(tmp_path: Path, capsys: pytest.CaptureFixture[str], warm: None) -> Callable[..., dict[str, Any]]:
    def diagnose(architecture: str, *arguments: str) -> dict[str, Any]:
        save = save_vision_checkpoint if architecture in ALL_VISION else save_checkpoint
        base = save(architecture, tmp_path / "base")
        code = main(["doctor", str(base), "--json", *options(architecture), *arguments])
        captured = capsys.readouterr()
        assert captured.out, captured.err
        answer = json.loads(captured.out)
        config = json.loads((base / "config.json").read_text())
        shutil.rmtree(base)
        assert (code, answer["error"], answer["exact"]) == (0, None, True), answer
        return {"class": config["architectures"][0], **answer}

    return diagnose


@pytest.mark.server
def test_experts_on_two_workers_are_exact(diagnosed: Callable[..., dict[str, Any]]) -> None:
    answer = diagnosed("qwen3_moe", "--tensor-parallel-size", "2", "--enable-expert-parallel")
    assert answer["ranks"] == 2
    kinds = {report["name"].split(".")[-2]: report["kind"] for report in answer["tensors"]}
    assert (kinds["gate_proj"], kinds["q_proj"]) == ("relayout", "affine")


@pytest.mark.server
@pytest.mark.matrix
@pytest.mark.usefixtures("warm")
def test_a_config_is_enough_with_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    EXPERTS["gpt_oss"]().save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path), "--random", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"]


@needs_torchvision
@pytest.mark.server
@pytest.mark.matrix
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    ("architecture", "tower"),
    [
        ("qwen3_5", ".visual."),
        ("qwen3_vl_moe", ".visual."),
        ("gemma3_vl", "vision_tower.vision_model."),
        ("mistral3", "vision_tower."),
        ("llama4_vl", "vision_model."),
        ("internvl", "vision_tower."),
    ],
)
def test_the_random_model_of_a_vision_language_config_has_its_tower(
    architecture: str, tower: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_vision_checkpoint(architecture, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert main(["doctor", str(tmp_path), "--random", "--json"]) == 0
    names = [report["name"] for report in json.loads(capsys.readouterr().out)["tensors"]]
    assert any(tower in name for name in names)


@pytest.mark.parametrize("random", [True, False])
def test_a_vision_language_model_without_processor_and_tokenizer_is_refused(random: bool, tmp_path: Path) -> None:
    if random:
        ALL_VISION["gemma3_vl"]().save_pretrained(tmp_path)
    else:
        transformers.AutoModelForImageTextToText.from_config(ALL_VISION["gemma3_vl"]()).save_pretrained(tmp_path)
    examine = make_random_checkpoint if random else make_trial
    with pytest.raises(ConfigError, match=r"lacks processor_config.json and tokenizer.json. Add them: hf download"):
        examine(tmp_path, tmp_path / "examined")


# --- other dtypes -------------------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.matrix
@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("qwen3_tied", ["--dtype", "float16"]),
        ("glm4_moe", ["--dtype", "float16"]),  # its router is float32
        ("falcon_h1", ["--dtype", "float16"]),
        ("qwen3_tied", ["--dtype", "float32"]),
        ("qwen3_moe", ["--dtype", "float32"]),
        ("deepseek_v3", ["--dtype", "float32"]),
        ("falcon_h1", ["--dtype", "float32"]),
        ("qwen3_next", ["--dtype", "float32"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_servers_of_other_dtypes_are_exact(
    architecture: str, arguments: list[str], diagnosed: Callable[..., dict[str, Any]]
) -> None:
    answer = diagnosed(architecture, *arguments)
    if arguments[-1] == "float32":
        assert not [row for row in answer["tensors"] if row["kind"] == "dense" and "A_log" not in row["name"]]


@pytest.mark.server
@pytest.mark.matrix
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(("published", "served"), [("float16", "float32"), ("bfloat16", "float16")])
def test_a_server_of_another_dtype_is_refused_with_ways_out_that_work(
    published: str, served: str, tmp_path: Path
) -> None:
    """Other bits than the run's, and more than are loaded whole without being asked for."""
    dtype = getattr(torch, published)
    base = save_checkpoint("qwen3_tied", tmp_path / "base")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    trial = make_trial(base, tmp_path, dtype=dtype)
    refused = diagnosis.examine(trial, engine_options("--dtype", served), make(tmp_path / "refused"))
    assert refused.error is not None
    assert "HUBSYNC_DENSE_FALLBACK=1" in refused.error
    assert "--dtype" in refused.error
    allowed = engine_options("--dtype", served, "--dense-fallback")
    assert diagnosis.examine(trial, allowed, make(tmp_path / "allowed")).exact
    assert diagnosis.examine(trial, engine_options("--dtype", published), make(tmp_path / "same")).exact


def make(directory: Path) -> Path:
    directory.mkdir()
    return directory


def engine_options(*arguments: str) -> dict[str, Any]:
    """The arguments of `LLM` that the command makes of its own."""
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor._engine_options(parser.parse_args(["model", *arguments]))


# --- every architecture -------------------------------------------------------------------------------

LAYOUTS = {
    "tp1": [],
    "tp2": ["--tensor-parallel-size", "2"],
    "ep2": ["--tensor-parallel-size", "2", "--enable-expert-parallel"],
}
ALL = (*CONFIGS, *EXPERTS, *MIXED, *VISION)
EVERY = (*ALL, *MORE, *(name for name in ALL_VISION if name not in VISION))
SPARSE = (*EXPERTS, "deepseek_v3", "glm4_moe", "qwen3_next", "minimax_m2", "qwen3_5_moe", "qwen3_vl_moe")
MATRIX = [
    pytest.param(name, layout, id=f"{name}-{layout}", marks=[needs_torchvision] if name in ALL_VISION else [])
    for layout, names in {"tp1": EVERY, "tp2": ALL, "ep2": SPARSE}.items()
    for name in names
]


@pytest.mark.server
@pytest.mark.matrix
@pytest.mark.parametrize(("architecture", "layout"), MATRIX)
def test_every_architecture_in_every_layout_is_exact(
    architecture: str, layout: str, diagnosed: Callable[..., dict[str, Any]]
) -> None:
    matrix.record(architecture, layout, diagnosed(architecture, *LAYOUTS[layout]))
