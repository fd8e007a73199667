"""Base checkpoints with tensors that the trained model does not have, such as MTP heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.cli.main import main
from tests.support.tiny import Tiny, patterns, train, view_of

HEADS = {
    "mtp.0.proj.weight": torch.randn(6, 6),
    "mtp.0.norm.weight": torch.randn(6).bfloat16(),
    "mtp.0.steps": torch.arange(3),
    "rotary_emb.inv_freq": torch.randn(3),
}


@pytest.fixture
def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def save_base(model: Tiny, directory: Path, *, sharded: bool) -> Path:
    """The model in bf16, with MTP heads and the tied head, in one file or in two."""
    view = {name: tensor.contiguous() for name, tensor in view_of(model).items()}
    more = {**HEADS, "head.weight": view["embed.weight"].clone()}
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    if not sharded:
        save_file({**view, **more}, directory / "model.safetensors")
        return directory
    files = {"model-00001-of-00002.safetensors": view, "model-00002-of-00002.safetensors": more}
    for name, tensors in files.items():
        save_file(tensors, directory / name)
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("sharded", [False, True])
def test_pull_writes_a_complete_checkpoint(
    sharded: bool, model: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run, out = save_base(model, tmp_path / "base", sharded=sharded), str(tmp_path / "run"), tmp_path / "out"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=run, base_model=str(base))) as engine:
        assert engine.run.base.model == str(base)
        train(model, optimizer)
        engine.publish(1).result()
    assert main(["pull", run, str(out), "--base", str(base)]) == 0
    assert "5 tensors that are not part of the run are those of the base model" in capsys.readouterr().out
    written = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    view = view_of(model)
    assert written.keys() == {*view, *HEADS, "head.weight"}
    assert all(patterns(written[name]) == patterns(tensor) for name, tensor in view.items())
    assert all(torch.equal(written[name], tensor) for name, tensor in HEADS.items())
    assert patterns(written["head.weight"]) == patterns(view["embed.weight"]), "a tied copy has the trained values"


def test_an_uploaded_model_without_them_is_warned_of_once_by_name(
    model: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_base(model, tmp_path / "base", sharded=False)
    config = SyncConfig(bucket=str(tmp_path / "run"), base_model=str(base))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        for _ in range(2):
            train(model, optimizer)
            engine.publish().result()
            engine.anchor()
    (warning,) = (text for text in caplog.messages if "does not have" in text)
    assert "does not have 2 tensors of" in warning
    assert "mtp.0.proj.weight" in warning
    assert "mtp.0.norm.weight" in warning
