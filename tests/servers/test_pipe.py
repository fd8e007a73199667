"""The whole way of a model: trained, published, followed by an engine of the base, pulled, loaded by a fresh engine.

Both engines must have the same tokens, log-probabilities, and bits in every tensor that their models reach.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.cli.main import main
from hubsync.doctor.diagnosis import _ENVIRONMENT
from hubsync.format.checkpoint import header
from tests.support.models import VOCABULARY, save_checkpoint
from tests.support.on_gpu import DEVICE, ENGINE_OPTIONS
from tests.support.processors import ID
from tests.support.vision_models import HAS_TORCHVISION, VISION, save_vision_checkpoint, transform
from tests.support.warm import run_warm

pytestmark = pytest.mark.server

_OPTIONS = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "max_model_len": 128,
    "max_num_seqs": 4,
    **ENGINE_OPTIONS,
}
_LATENT = ("deepseek_v3", "glm4_moe_lite")
_PROMPTS = [[(7 * at * at + seed) % VOCABULARY for at in range(24)] for seed in (3, 5)]


def engine_report(
    checkpoint: Path, workdir: Path, address: str, targets: list[Any], image_prompt: Any = None, **options: Any
) -> dict[str, Any]:
    """What `engine_run` reports of an engine of this checkpoint that has followed a run to the targets."""
    workdir.mkdir()
    spec, report, log = workdir / "spec", workdir / "report", workdir / "log"
    spec.write_text(
        json.dumps(
            {
                "checkpoint": str(checkpoint),
                "options": _OPTIONS | options,
                "targets": targets,
                "prompts": _PROMPTS,
                "image_prompt": image_prompt,
            }
        )
    )
    environment = {**_ENVIRONMENT, **os.environ, "HUBSYNC_BUCKET": address, "HUBSYNC_CACHE": str(workdir / "cache")}
    command = [sys.executable, "-m", "tests.support.engine_run", str(spec), str(report)]
    assert run_warm(command, environment, log) == 0, log.read_text()[-3000:]
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["error"] is None, found["error"]
    return found


def train(model: Any, address: str, base: Path, settings: Mapping[str, Any], towers: bool = False) -> list[list[Any]]:
    """Two optimizer steps on text, each published. Also changes buffers, as trainers change biases of routers.

    Args:
        towers: train vision towers too, with gradients that are random.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(towers or ".visual." not in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    positions = []
    with DeltaWeightTransferEngine(
        model, optimizer, SyncConfig(bucket=address, base_model=str(base), **settings)
    ) as engine:
        assert engine.run.base.model == str(base)
        for step in range(2):
            tokens = torch.randint(0, VOCABULARY - 200, (2, 16), generator=torch.Generator().manual_seed(step)).to(
                DEVICE
            )
            logits = model(input_ids=tokens).logits
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if "bias" in name:
                        buffer += 1e-3
            engine.publish()
            engine.wait()
            positions.append([engine.position.version, engine.position.digest])
    return positions


def assert_pipe(
    base: Path, tmp_path: Path, *, model: Any = None, settings: Any = None, towers: bool = False, **options: Any
) -> Path:
    """Returns the pulled checkpoint."""
    address, pulled = str(tmp_path / "bucket"), tmp_path / "pulled"
    cls = (
        transformers.AutoModelForImageTextToText
        if "vision_config" in _config(base)
        else transformers.AutoModelForCausalLM
    )
    model = (model or cls.from_pretrained(base, dtype=torch.float32)).to(DEVICE)
    targets = train(model, address, base, settings or {}, towers)
    assert [version for version, _ in targets] == [1, 2]
    followed = engine_report(base, tmp_path / "followed", address, targets, **options)
    assert main(["pull", address, str(pulled), "--base", str(base)]) == 0
    fresh = engine_report(pulled, tmp_path / "fresh", address, [], **options)
    assert followed["answers"] == fresh["answers"]
    assert len(fresh["memory"][0]) > 10
    for ours, expected in zip(followed["memory"], fresh["memory"], strict=True):
        assert ours == expected, sorted(
            name for name in ours.keys() | expected.keys() if ours.get(name) != expected.get(name)
        )
    return pulled


def _config(base: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((base / "config.json").read_text())
    return config


def test_a_hybrid_of_mamba_and_attention_is_exact(tmp_path: Path) -> None:
    """Its loader computes `-exp(A_log)` in float32."""
    assert_pipe(save_checkpoint("falcon_h1", tmp_path / "base"), tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "architecture", ["deepseek_v3", "glm4_moe", "glm4_moe_lite", "qwen3_next", "mamba2", "qwen3_moe"]
)
def test_text_models_are_exact(architecture: str, tmp_path: Path) -> None:
    backend = {"attention_backend": "CPU_MLA"} if architecture in _LATENT and DEVICE == "cpu" else {}
    assert_pipe(save_checkpoint(architecture, tmp_path / "base"), tmp_path, **backend)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("architecture", "settings", "options"),
    [
        ("glm4_moe", {"view_dtype": "float16"}, {"dtype": "float16"}),  # its router is float32
        ("qwen3_moe", {}, {"dtype": "float32"}),
        ("qwen3_tied", {}, {"hf_overrides": {"head_dtype": "float32"}}),
    ],
    ids=["float16", "float32", "head_dtype"],
)
def test_servers_of_other_dtypes_are_exact(
    architecture: str, settings: dict[str, str], options: dict[str, Any], tmp_path: Path
) -> None:
    assert_pipe(save_checkpoint(architecture, tmp_path / "base"), tmp_path, settings=settings, **options)


@pytest.mark.matrix
@pytest.mark.skipif(not HAS_TORCHVISION, reason="needs torchvision: make test-matrix")
@pytest.mark.parametrize("architecture", VISION)
def test_vision_language_models_are_exact(architecture: str, tmp_path: Path) -> None:
    assert_pipe(save_vision_checkpoint(architecture, tmp_path / "base"), tmp_path)


@pytest.mark.matrix
@pytest.mark.skipif(not HAS_TORCHVISION, reason="needs torchvision: make test-matrix")
@pytest.mark.parametrize("towers", [False, True], ids=["frozen", "trained"])
def test_answers_to_images_are_those_of_the_new_weights(towers: bool, tmp_path: Path) -> None:
    """The same image was answered by the old ones: no cache of what the vision tower computed survives."""
    base = save_vision_checkpoint("qwen3_vl", tmp_path / "base")
    names = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
    assert_pipe(base, tmp_path, towers=towers, image_prompt=[*map(ID.__getitem__, names), *_PROMPTS[0]])


@pytest.mark.matrix
@pytest.mark.skipif(not HAS_TORCHVISION, reason="needs torchvision: make test-matrix")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["qwen3_5", "qwen3_5_moe"])
def test_tensors_that_the_checkpoint_keeps_in_float32_are_exact(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Qwen3.5 as it is published. `A_log` is no bfloat16 number, and vLLM serves it in float32.

    A model in bfloat16 has rounded it. Then servers of the base do so when they attach.
    """
    base = save_vision_checkpoint(architecture, tmp_path / "base")
    for words in (".A_log", ".linear_attn.norm.weight"):
        transform(base, words, lambda tensor: tensor.float() + 2**-20)
    model = transformers.AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
    pulled = assert_pipe(base, tmp_path, model=model)
    kept = {name.split(".")[-1] for name, (_, code) in header(pulled).items() if code == "F32"}
    assert kept == ({"A_log", "weight"} if dtype == torch.float32 else set())


@pytest.mark.matrix
@pytest.mark.skipif(not HAS_TORCHVISION, reason="needs torchvision: make test-matrix")
@pytest.mark.parametrize("architecture", ["qwen3_5", "gemma3_vl"])
def test_a_language_model_that_is_trained_without_its_towers_is_followed_with_them(
    architecture: str, tmp_path: Path
) -> None:
    """Its tensors have the names of the base checkpoint, in whose servers the towers stay as they are."""
    base = save_vision_checkpoint(architecture, tmp_path / "base")
    pulled = assert_pipe(base, tmp_path, model=language_model_of(base))
    assert header(pulled) == header(base)


def language_model_of(base: Path) -> Any:
    """The language model of a multimodal checkpoint, in float32, as a model of its own."""
    whole = transformers.AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    config = whole.config.get_text_config()
    config.tie_word_embeddings = whole.lm_head.weight is whole.get_input_embeddings().weight
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.model.load_state_dict(whole.model.language_model.state_dict())
    model.lm_head.load_state_dict(whole.lm_head.state_dict())
    return model
