"""Each tensor has its dtype: the view's, or the one in which the base checkpoint keeps it; and the base's layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.errors import RunMismatch
from hubsync.format.checkpoint import header, kept_dtypes
from tests.support.tiny import Tiny, follow, patterns, train

KEPT = {"scale", "bias"}


def save_base(model: Tiny, directory: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint with a parameter and a buffer in float32, and the rest in `dtype`."""
    directory.mkdir()
    names = {name for name, _ in model.named_parameters()} | {"bias"}
    tensors = {
        name: tensor.to(torch.float32 if name in KEPT else dtype).clone()
        for name, tensor in model.state_dict().items()
        if name in names
    }
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture
def base(model: Tiny, tmp_path: Path) -> Path:
    directory = save_base(model, tmp_path / "base")
    with safe_open(directory / "model.safetensors", "pt") as file:
        model.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()}, strict=False)  # noqa: SIM118
    return directory


def expected(model: Tiny) -> dict[str, torch.Tensor]:
    named = {**dict(model.named_parameters()), "bias": model.bias}
    return {
        name: tensor.detach().to(torch.float32 if name in KEPT else torch.bfloat16, copy=True)
        for name, tensor in named.items()
    }


def assert_followed(model: Tiny, address: str, tmp_path: Path, base: dict[str, torch.Tensor]) -> None:
    found = follow(address, tmp_path, base=base).tensors
    for name, tensor in expected(model).items():
        assert found[name].dtype == tensor.dtype
        assert patterns(found[name]) == patterns(tensor), name


@pytest.mark.parametrize(("detector", "encoding"), [("sliced", "fast"), ("snapshot", "fast"), ("snapshot", "compact")])
def test_tensors_that_the_base_keeps_in_float32_are_published_in_float32(
    detector: str, encoding: str, model: Tiny, base: Path, address: str, tmp_path: Path
) -> None:
    start = expected(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    config = SyncConfig(bucket=address, base_model=str(base), detector=detector, encoding=encoding)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        assert engine.run.base.model == str(base), "version 0 is the base checkpoint"
        assert {spec.name for spec in engine.run.table if spec.dtype == "F32"} == KEPT
        for step in range(3):
            train(model, optimizer)
            with torch.no_grad():
                model.bias += 1e-4  # too small for bfloat16 beside 1
            assert engine.publish(step).result().rewritten == ()
            assert_followed(model, address, tmp_path, start)
        anchor = engine.anchor()
    (directory,) = {path.parent for path in ChainReader(LocalBucket(address), tmp_path / "c").fetch(anchor)}
    assert {name for name, (_, dtype) in header(directory).items() if dtype == "F32"} == KEPT


def test_a_model_in_bfloat16_publishes_in_bfloat16_what_the_base_keeps_in_float32(
    model: Tiny, base: Path, address: str
) -> None:
    """Servers of the base round these tensors when they attach. `scale` alone is float32 in the model."""
    model.to(torch.bfloat16)
    model.scale.data = model.scale.data.float()
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address, base_model=str(base))) as engine:
        assert engine.run.base.model == str(base)
        assert {spec.name for spec in engine.run.table if spec.dtype == "F32"} == {"scale"}


def test_a_float32_base_is_served_in_the_dtype_of_the_view(model: Tiny, address: str, tmp_path: Path) -> None:
    base = save_base(model, tmp_path / "base", torch.float32)
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address, base_model=str(base))) as engine:
        assert {spec.dtype for spec in engine.run.table} == {"BF16"}


def test_a_trainer_without_the_base_resumes_with_the_dtypes_of_the_run(
    model: Tiny, base: Path, address: str, tmp_path: Path
) -> None:
    start = expected(model)
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address, base_model=str(base))) as engine:
        table = engine.run.table
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address, base_model="gone")) as engine:
        assert engine.run.table == table
        with torch.no_grad():
            model.scale += 1e-4
        assert engine.publish(1).result().changed == 1
    assert_followed(model, address, tmp_path, start)


def test_a_run_in_another_dtype_is_another_run(model: Tiny, base: Path, address: str) -> None:
    DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address, base_model=str(base))).close()
    config = SyncConfig(bucket=address, base_model=str(base), view_dtype="float16")
    with pytest.raises(RunMismatch, match=r"has embed\.weight BF16"):
        DeltaWeightTransferEngine(model, None, config)


def test_modules_that_transformers_keeps_in_float32_are_published_in_float32(model: Tiny, address: str) -> None:
    model._keep_in_fp32_modules_strict = ["scale", "layers.1"]
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        kept = {spec.name for spec in engine.run.table if spec.dtype == "F32"}
    assert kept == {"scale", "layers.1.weight", "layers.1.bias"}


def retouched(base: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("detector", ["auto", "snapshot"])
def test_tensors_that_the_base_has_transposed_are_published_transposed(
    detector: str, model: Tiny, base: Path, address: str, tmp_path: Path
) -> None:
    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        tensors["embed.weight"] = tensors["embed.weight"].t().contiguous()

    retouched(base, transpose)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start = load_file(base / "model.safetensors")
    config = SyncConfig(bucket=address, base_model=str(base), detector=detector)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        assert engine.run.base.model == str(base), "servers of the base are at version 0"
        train(model, optimizer)
        engine.publish()
        engine.anchor()
    found = follow(address, tmp_path, base=start).tensors["embed.weight"]
    assert patterns(found) == patterns(model.embed.weight.detach().bfloat16().t())
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, base_model="gone")) as engine:
        assert engine.position.version == 1, "a trainer without the base has the layout of the run"


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["layers.0.weight"]


def grow(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.0.weight"] = torch.zeros(7, 6, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose, "layers.0.weight is not in it"),
        (grow, "layers.0.weight has shape [7, 6] in it, and [6, 6] in the model"),
    ],
)
def test_a_trainer_names_the_tensors_in_which_the_model_is_not_the_base(
    change: Callable[[dict[str, torch.Tensor]], None],
    words: str,
    model: Tiny,
    base: Path,
    address: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    retouched(base, change)
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address, base_model=str(base))) as engine:
        assert engine.run.base.model is None
        assert engine.position.version == 0
    assert words in caplog.text
    assert "refuses the run: start servers from that upload" in caplog.text


def test_the_usual_dtype_is_that_of_most_elements() -> None:
    specs = {"a": ((3,), "F32"), "b": ((2, 2), "BF16"), "c": ((9,), "I64"), "d": ((1,), "F16")}
    assert kept_dtypes(specs) == {"a": "F32", "d": "F16"}
    assert kept_dtypes({}) == {}
