"""Runs that publish a LoRA adapter: as exact and resumable as runs of a full model, on the local Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader, Layout
from hubsync.chain.replay import replay
from hubsync.cli.main import main
from hubsync.errors import ConfigError, RunMismatch
from hubsync.format.manifest import Adapter, Run
from hubsync.publish.config import SyncConfig
from hubsync.publish.engine import DeltaWeightTransferEngine
from tests.support.adapted import adapted, published, save_base, train

Engine = Callable[..., DeltaWeightTransferEngine]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def engine(hub_environment: dict[str, str], hub_address: str) -> Engine:
    """Makes engines of one run."""
    return lambda model, **settings: DeltaWeightTransferEngine(model, None, SyncConfig(bucket=hub_address, **settings))


@pytest.fixture
def reader(engine: Engine, hub_address: str, tmp_path: Path) -> Callable[[], ChainReader]:
    return lambda: ChainReader(open_bucket(hub_address), tmp_path / "cache")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.int16), b[name].view(torch.int16)) for name in a)


def test_every_version_is_the_trained_adapter_without_the_base(
    base: Path, engine: Engine, reader: Callable[[], ChainReader]
) -> None:
    model = adapted(base)
    views = [published(model)]
    with engine(model) as running:
        for step in range(3):
            train(model, 1e-3)
            running.publish(step).result()
            views.append(published(model))
        run = running.run
    assert run.adapter is not None
    assert (run.adapter.config["r"], run.adapter.config["lora_alpha"], run.adapter.base.model) == (4, 8, str(base))
    assert {spec.name for spec in run.table} == views[0].keys()
    for version, view in enumerate(views):
        chain = reader()
        assert same(dict(replay(chain, chain.plan(None, version)).tensors), view)


def test_an_anchor_is_an_adapter_that_peft_loads(base: Path, engine: Engine, reader: Callable[[], ChainReader]) -> None:
    model = adapted(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    config = SyncConfig(bucket=engine(model).config.bucket)
    with DeltaWeightTransferEngine(model, None, config, processing_class=tokenizer) as running:
        train(model)
        running.publish().result()
        directory = reader().fetch(running.anchor())[0].parent
    assert (directory / "tokenizer.json").exists()
    assert not (directory / "config.json").exists(), "it would be mistaken for a full model"
    fresh = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(fresh, directory)
    assert same(published(loaded), published(model))


def test_a_version_between_anchors_is_pulled_as_an_adapter(
    base: Path, engine: Engine, hub_address: str, tmp_path: Path
) -> None:
    model = adapted(base)
    with engine(model) as running:
        train(model)
        running.publish().result()
    assert main(["pull", hub_address, str(tmp_path / "out")]) == 0
    assert same(load_file(tmp_path / "out" / "adapter_model.safetensors"), published(model))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_run_continues_only_with_the_same_adapter(base: Path, engine: Engine) -> None:
    model = adapted(base)
    with engine(model) as running:
        train(model)
        running.publish().result()
        before = running.position
    with engine(model) as again:
        assert again.position == before
        train(model)
        assert again.publish().result().version > before.version
    with pytest.raises(RunMismatch, match="lora_alpha=8"):
        engine(adapted(base, lora_alpha=16))
    with pytest.raises(RunMismatch):
        engine(adapted(base, r=8))
    with torch.no_grad():
        model.get_base_model().model.norm.weight.add_(1)
    with pytest.raises(RunMismatch, match="other weights"):
        engine(model)


def test_an_adapter_that_is_merged_into_the_base_is_not_published(base: Path, engine: Engine) -> None:
    model = adapted(base)
    with engine(model) as running:
        train(model)
        model.merge_adapter()
        with pytest.raises(ConfigError, match="drift"):
            running.publish()
        model.unmerge_adapter()
        assert running.publish().result().changed > 0
        model.merge_and_unload()
        with pytest.raises(ConfigError, match="drift"):
            running.publish()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ],
)
def test_an_adapter_that_vllm_cannot_load_is_refused(
    base: Path, engine: Engine, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        engine(adapted(base, **settings))


def test_an_adapter_of_a_quantised_base_is_published(
    base: Path, engine: Engine, reader: Callable[[], ChainReader]
) -> None:
    """QLoRA: the base has integers, 4 bits a weight. A stand-in for bitsandbytes' layer: nothing computes with it."""
    model = adapted(base)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    packed = torch.randint(0, 256, (layer.weight.numel() // 2, 1), dtype=torch.uint8)
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    with engine(model) as running:
        train(model)
        running.publish().result()
        assert running.run.adapter is not None
        assert running.run.adapter.base_digest is None
        layer.weight[0] ^= 1
        with pytest.raises(ConfigError, match=r"q_proj.* of the frozen base model have changed"):
            running.publish()
    chain = reader()
    assert same(dict(replay(chain, chain.plan(None, 1)).tensors), published(model))


def test_trained_weights_outside_the_adapter_are_refused(base: Path, engine: Engine) -> None:
    model = adapted(base)
    model.get_base_model().model.norm.weight.requires_grad_()
    with pytest.raises(ConfigError, match=r"norm\.weight is trained"):
        engine(model)


def test_known_adapter_settings_of_a_run_survive_and_the_rest_is_dropped(base: Path, engine: Engine) -> None:
    with engine(adapted(base)) as running:
        run = running.run
        stored = open_bucket(running.config.bucket).read([Layout.RUN])[Layout.RUN]
    assert Run.loads(stored) == run
    assert json.loads(stored)["view"] == "adapter"
    hostile = {"config": {"r": 4, "auto_mapping": {"parent_library": "antigravity"}}, "base": {}}
    assert dict(Adapter.from_json(hostile).config) == {"r": 4}
