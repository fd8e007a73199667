"""Models that hold their weights in another form than their checkpoint: fused experts, and other names.

What is published of them must be what transformers itself writes, bit for bit: `save_pretrained` is asked each time.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader, Layout
from hubsync.chain.replay import View, replay
from hubsync.errors import ConfigError
from hubsync.format.digest import Digest
from hubsync.publish.detect.choose import choose_detector
from hubsync.publish.detect.sliced import Sliced
from hubsync.publish.detect.snapshot import Snapshot
from hubsync.publish.view import conversion, shards, strided
from hubsync.publish.view.boxes import Box
from hubsync.publish.view.deepspeed import Partition
from hubsync.publish.view.live import model_tensors, published_tensors, table_of
from hubsync.publish.view.placements import Split, split_boxes
from hubsync.publish.view.shards import Shard, divide, local_part
from hubsync.publish.view.strided import Place, StridedView
from tests.support.tiny import same_bits

transformers = pytest.importorskip("transformers", minversion="5")

# Sizes that words and vectors do not divide; torch's grouped products would not take them.
_TINY = {
    "vocab_size": 64, "hidden_size": 30, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "num_experts_per_tok": 2, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "experts_implementation": "eager",
}  # fmt: skip


def qwen(intermediate: int = 7) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**_TINY, num_experts=5, moe_intermediate_size=intermediate)
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral() -> Any:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_TINY, num_local_experts=3))


MODELS = {"qwen3_moe": qwen, "mixtral": mixtral}


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    tokens = torch.randint(0, 64, (2, 6))
    torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def saved(model: Any, directory: Path) -> dict[str, torch.Tensor]:
    """The bf16 checkpoint that transformers writes of the model."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def follow(address: Path | str, tmp_path: Path) -> View:
    reader = ChainReader(LocalBucket(str(address)), tmp_path / "cache")
    return replay(reader, reader.plan(None))


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "bucket")


# --- exact ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "detector", "dtype", "fused"),
    [
        ("qwen3_moe", "sliced", torch.float32, True),
        ("qwen3_moe", "snapshot", torch.bfloat16, True),
        ("mixtral", "sliced", torch.bfloat16, False),
        ("mixtral", "snapshot", torch.float32, False),
    ],
)
def test_a_replica_ends_with_the_checkpoint_that_transformers_saves(
    architecture: str, detector: str, dtype: torch.dtype, fused: bool, address: str, tmp_path: Path
) -> None:
    model = MODELS[architecture]().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, detector=detector)) as engine:
        for number in range(3):
            step(model, optimizer, number)
            if number != 1:
                engine.publish()
    view, expected = follow(address, tmp_path), saved(model, tmp_path / "saved")
    assert same_bits(view.tensors, expected)
    assert view.position == engine.position
    assert view.position.version == 2, "by deltas alone"
    experts = "mlp.experts.2.down_proj" if architecture == "qwen3_moe" else "block_sparse_moe.experts.2.w2"
    assert f"model.layers.1.{experts}.weight" in expected


def test_parts_of_a_parameter_are_views_of_it(address: str) -> None:
    model = qwen()
    tensors = published_tensors(model)
    fused = model.model.layers[1].mlp.experts.gate_up_proj
    up = local_part(tensors["model.layers.1.mlp.experts.3.up_proj.weight"])
    assert up.data_ptr() == fused[3, 7:].data_ptr()
    assert torch.equal(up, fused[3, 7:])
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in model.parameters())
    live = list(tensors.values())
    rows = strided.element_runs(live, [Shard.whole(tensor.shape) for tensor in live], [torch.bfloat16] * len(live))
    assert len(rows) == len(list(model.parameters())), "each parameter is compared as a whole"


def test_strided_views_inherit_requires_grad_and_need_contiguous_memory() -> None:
    whole = torch.nn.Parameter(torch.zeros(4, 3))
    place = Place((2, 3), (3, 1), 6)
    assert StridedView("part", whole, place).requires_grad
    assert not StridedView("part", whole.requires_grad_(False), place).requires_grad
    with pytest.raises(ConfigError, match="part is a part of a parameter whose memory is not contiguous"):
        StridedView("part", torch.zeros(3, 4).t(), place)


def test_an_anchor_is_a_checkpoint_that_transformers_loads(address: str) -> None:
    model = mixtral()
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        manifest = engine.anchor()
    directory = Path(address, Layout.part(manifest, manifest.parts[0])).parent
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    trained = {name: tensor.detach().bfloat16() for name, tensor in model.named_parameters()}
    assert same_bits({name: tensor.detach() for name, tensor in loaded.named_parameters()}, trained)


@pytest.mark.parametrize("detector", ["sliced", "snapshot"])
def test_a_model_loaded_from_its_checkpoint_needs_no_upload(detector: str, address: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    qwen().to(torch.bfloat16).save_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, experts_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = SyncConfig(bucket=address, detector=detector)
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        assert engine.run.base.model == str(base), "servers load version 0 from there"
        step(model, optimizer, 0)
        engine.publish()
    with DeltaWeightTransferEngine(model, optimizer, config) as engine:
        step(model, optimizer, 1)
        engine.publish()
    reader = ChainReader(LocalBucket(address), tmp_path / "cache")
    plan = reader.plan(None, base_available=True)
    assert plan.base
    assert len(plan.steps) == 2
    view = replay(reader, plan, load_file(base / "model.safetensors"))
    assert same_bits(view.tensors, saved(model, tmp_path / "saved"))


def test_names_are_those_without_wrappers_of_model_and_layers(address: str) -> None:
    model = qwen()
    expected = list(published_tensors(model))
    compiled = torch.compile(model)
    assert list(published_tensors(compiled)) == expected
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert list(published_tensors(compiled)) == expected
    inside = torch.nn.Sequential(model)
    inside.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    assert list(published_tensors(inside)) == ["scale", *(f"0.{name}" for name in expected)]


def test_a_write_outside_of_steps_is_detected_in_any_part(address: str, tmp_path: Path) -> None:
    model = qwen()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, detector="sliced")) as engine:
        step(model, optimizer, 0)
        engine.publish()
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[4] += 1
        engine.publish()
    assert same_bits(follow(address, tmp_path).tensors, saved(model, tmp_path / "saved"))


@pytest.mark.parametrize("detector", ["sliced", "snapshot"])
@pytest.mark.parametrize("change", [lambda data: data[:3].clone(), lambda data: data.mT.contiguous()])
def test_experts_of_another_shape_are_refused_by_name(
    change: Callable[[torch.Tensor], torch.Tensor], detector: str, address: str
) -> None:
    model = qwen()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    engine = DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address, detector=detector))
    step(model, optimizer, 1)
    experts = model.model.layers[1].mlp.experts.down_proj
    before = experts.data
    experts.data = change(before)
    with pytest.raises(ConfigError, match=r"layers.1.mlp.experts.down_proj now has shape .* make a new engine"):
        engine.publish()
    experts.data = before
    engine.close()


def test_replaced_parameters_are_published(address: str, tmp_path: Path) -> None:
    model = qwen()
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address)) as engine:
        experts = model.model.layers[0].mlp.experts
        experts.down_proj = torch.nn.Parameter(experts.down_proj.detach() + 1)
        engine.publish()
    assert same_bits(follow(address, tmp_path).tensors, saved(model, tmp_path / "saved"))


# --- other conversions ------------------------------------------------------------------------------


def converted(*conversions: Any) -> Any:
    """A Qwen3-MoE that claims to be loaded through these conversions."""
    model = qwen(30)  # as wide as the hidden states: transposed, experts have the same shape
    model._weight_conversions = list(conversions)
    return model


def test_transposed_tensors_are_detected_by_a_snapshot(
    address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.core_model_loading import Transpose, WeightConverter

    model = converted(WeightConverter("experts.down", "experts.down_proj", [Transpose(1, 2)]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with (
        caplog.at_level(logging.INFO),
        DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=address)) as engine,
    ):
        step(model, optimizer, 0)
        engine.publish()
    assert "experts.down is scattered in the parameter" in caplog.text
    view = follow(address, tmp_path)
    assert view.tensors["model.layers.0.mlp.experts.down"].shape == (5, 30, 30)
    assert same_bits(view.tensors, saved(model, tmp_path / "saved"))
    tensors = published_tensors(model)
    table = table_of(tensors, torch.bfloat16)
    shared = divide(
        list(tensors), [spec.shape for spec in table], [[Shard.whole(spec.shape).boxes for spec in table]] * 3
    )
    assert sum((Snapshot(tensors, table, shards=own).digest for own in shared), Digest()).hex == engine.position.digest
    with pytest.raises(ConfigError, match=r"is scattered.*detector='snapshot'"):
        DeltaWeightTransferEngine(model, optimizer, SyncConfig(bucket=f"{address}2", detector="sliced"))


def test_a_tensor_computed_from_parameters_is_refused_by_name(address: str) -> None:
    from transformers.core_model_loading import Chunk, Interleave, WeightConverter

    apart = ["self_attn.k_proj.weight", "self_attn.v_proj.weight"]
    for converter, name in [
        (WeightConverter("experts.w13", "experts.gate_up_proj", [Interleave(dim=1)]), r"experts\.w13"),
        (WeightConverter("self_attn.both.weight", apart, [Chunk(dim=0)]), r"self_attn\.both\.weight"),
    ]:
        with pytest.raises(ConfigError, match=rf"model\.layers\.0\.\S*{name} with shape .* computed"):
            DeltaWeightTransferEngine(converted(converter), None, SyncConfig(bucket=address))
    assert not Path(address).exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tensor: tensor.mul_(2), r"cannot revert its conversion of Qwen3MoeForCausalLM.*writes"),
        (lambda tensor: tensor.view(torch.int32), "computed from the model's parameters"),
        (lambda tensor: tensor if tensor.is_meta else tensor * 2, "is saved with other elements than"),
        (lambda tensor: None, r"holds model\.layers\.0\.mlp\.experts\.\S* but does not save it"),
    ],
    ids=["written to", "other bits", "otherwise where there is memory", "left out"],
)
def test_a_conversion_that_computes_weights_is_refused(
    make: Callable[[torch.Tensor], torch.Tensor | None], message: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.core_model_loading import SplitModulelist

    convert = SplitModulelist.convert

    def otherwise(self: Any, *arguments: Any, **options: Any) -> Any:
        parts = {name: make(tensor) for name, tensor in convert(self, *arguments, **options).items()}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    monkeypatch.setattr(SplitModulelist, "convert", otherwise)
    with pytest.raises(ConfigError, match=message):
        DeltaWeightTransferEngine(qwen(), None, SyncConfig(bucket=address))


# --- positions -----------------------------------------------------------------------------------------


@given(st.data())
def test_boxes_of_a_part_over_ranks_add_up_to_the_part(data: st.DataObject) -> None:
    """Ranks hold rows of a parameter, and a contiguous part of it is published."""
    row = data.draw(st.integers(1, 4))
    rows, ranks = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    shape = data.draw(st.sampled_from([(s, row) for s in range(1, rows + 1)]))
    offset = data.draw(st.integers(0, rows - shape[0])) * row
    place = Place(shape, (row, 1), offset)
    seen = []
    for rank in range(ranks):
        (held, _), *_ = *split_boxes((rows, row), [Split(0, ranks, rank)]), (Box((rows, 0), (0, row)), None)
        start = held.offset[0] * row
        box = place.within(start, start + held.numel)
        assert box is not None
        if box.numel:
            first = offset + box.offset[0] * row
            assert start <= first
            assert first + box.numel <= start + held.numel
            seen += range(first, first + box.numel)
    assert seen == list(range(offset, offset + math.prod(shape)))


def test_a_split_part_is_held_as_rows_or_as_a_run_unless_it_is_scattered() -> None:
    assert Place((3, 4), (4, 1), 2).within(6, 14) == Box((1, 0), (2, 4))
    assert Place((2, 4), (4, 1), 0).within(0, 6) == Box((0,), (6,))
    assert Place((4, 2), (1, 4), 0).within(0, 4) is None
    assert Place((4, 2), (1, 4), 8).within(8, 16) is not None, "transposed, and held as a whole"
    assert not Place((4, 2), (1, 4), 0).is_contiguous
    assert Place((4, 1, 2), (2, 7, 1), 0).is_contiguous


def test_ranks_hold_whole_rows_of_a_part_that_is_transposed_within_rows() -> None:
    """FSDP2 shards experts [4, 3, 2], which are published as [4, 2, 3]."""
    whole = torch.arange(24.0).reshape(4, 3, 2)
    place = Place((4, 2, 3), (6, 1, 2), 0)
    assert [place.within(start, start + 12) for start in (0, 12)] == [
        Box((0, 0, 0), (2, 2, 3)),
        Box((2, 0, 0), (2, 2, 3)),
    ]
    assert place.within(0, 9) is None, "one and a half experts"
    assert torch.equal(whole.as_strided(place.shape, place.stride), whole.transpose(1, 2))


@given(st.data())
def test_owners_of_any_piece_find_the_changes_of_every_tensor(data: st.DataObject) -> None:
    """Consecutive parts, a scattered one and a gap, divided among ranks anywhere, compared in runs of any length."""
    size = data.draw(st.integers(1, 4))
    whole = torch.nn.Parameter(torch.arange(8.0 * size + 1)[1:])  # at an offset in its memory, like sharded tensors
    shapes = {"a": (2, size), "b": (size,), "c": (2, size)}
    offsets = {"a": 0, "b": 2 * size, "c": 3 * size}
    places = {name: Place(shape, (size, 1)[-len(shape) :], offsets[name]) for name, shape in shapes.items()}
    places["scattered"] = Place((size, 2), (1, size), 6 * size)
    live: dict[str, torch.Tensor] = {name: StridedView(name, whole, place) for name, place in places.items()}
    table = table_of(live, torch.bfloat16)
    held = [[Shard.whole(spec.shape).boxes for spec in table]] * data.draw(st.integers(1, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_ALIGNED", 1)
        patch.setattr(strided, "_LONGEST", data.draw(st.integers(1, 8 * size)))
        owned = divide(list(live), [spec.shape for spec in table], held)
        snapshots = [Snapshot(live, table, shards=own) for own in owned]
    before = {name: local_part(tensor).bfloat16().reshape(-1).clone() for name, tensor in live.items()}
    with torch.no_grad():
        whole[data.draw(st.lists(st.integers(0, 8 * size - 1), max_size=8))] += 100.0
    after = {name: local_part(tensor).bfloat16().reshape(-1) for name, tensor in live.items()}
    for snapshot in snapshots:
        detected = snapshot.detect()
        for index, delta in detected.patch.items():
            at, name = torch.from_numpy(delta.indices), table[index].name
            before[name][at] = after[name][at]
        snapshot.advance(detected)
        assert not snapshot.detect().changes
    assert same_bits(before, after)
    assert sum((snapshot.digest for snapshot in snapshots), Digest()) == Snapshot(live, table).digest


def test_the_sliced_detector_is_chosen_for_consecutive_experts() -> None:
    model = qwen()
    tensors = published_tensors(model)
    optimizer = torch.optim.AdamW(model.parameters())
    chosen = choose_detector(tensors, table_of(tensors, torch.bfloat16), optimizer, SyncConfig(bucket="unused"))
    assert isinstance(chosen, Sliced)
    assert not chosen._copied.indices, "nothing is copied"
    chosen.follow(published_tensors(model))
    assert chosen.detect().is_empty, "the same weights in new views"
    ends = [(local_part(t).data_ptr(), local_part(t).nbytes) for t in tensors.values()]
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(sorted(ends)))


class Kept(torch.nn.Parameter):
    """Stands in for one rank's part of a ZeRO-3 parameter. test_deepspeed.py has real ones."""

    def __new__(cls, whole: torch.Tensor, rank: int, ranks: int) -> Kept:
        made = super().__new__(cls, torch.empty(0))
        size = -(-whole.numel() // ranks)
        run = whole.flatten()[rank * size : (rank + 1) * size]
        kept = torch.cat([run, torch.full((size - len(run),), math.nan)])  # padding is never read
        kept.ds_numel = size  # type: ignore[attr-defined]
        made.ds_id, made.ds_shape, made.ds_process_group, made.ds_tensor = 0, whole.shape, rank, kept
        return made


@pytest.mark.parametrize("ranks", [1, 2, 3, 50])
def test_zero3_ranks_publish_their_runs_of_experts(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: group)
    old, new = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    places = {f"{expert}.up": Place((3, 5), (5, 1), 15 * expert) for expert in range(2)}

    def view(parameter: Kept) -> dict[str, torch.Tensor]:
        whole = Partition("experts", parameter)
        return {"plain": whole, **{name: StridedView(name, whole, place) for name, place in places.items()}}

    parameters = [Kept(old, rank, ranks) for rank in range(ranks)]
    views = [view(parameter) for parameter in parameters]
    table = table_of(views[0], torch.bfloat16)
    boxes = [[tensor.boxes for tensor in live.values()] for live in views]
    owned = divide(list(views[0]), [spec.shape for spec in table], boxes)
    snapshots = [Snapshot(live, table, shards=own) for live, own in zip(views, owned, strict=True)]
    found: dict[str, list[int]] = {spec.name: [] for spec in table}
    for rank, (parameter, snapshot) in enumerate(zip(parameters, snapshots, strict=True)):
        parameter.ds_tensor.copy_(Kept(new, rank, ranks).ds_tensor)
        snapshot.follow(view(parameter))
        for index, delta in snapshot.detect().patch.items():
            found[table[index].name] += delta.indices.tolist()
    moved = (old.bfloat16() != new.bfloat16()).flatten().nonzero().flatten().tolist()
    assert found["plain"] == moved
    assert found["0.up"] + [at + 15 for at in found["1.up"]] == moved


REFUSED = {
    "ernie4_5_vl_moe", "hrm_text", "inkling_mm_model", "kimi_k25", "nemotron_h_omni", "qianfan_ocr", "step3p7",
}  # fmt: skip


@pytest.mark.matrix
def test_which_models_of_transformers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that transformers builds from their default config, on the meta device, so no bits are compared."""
    from transformers.models.auto import modeling_auto

    monkeypatch.setattr(conversion, "_require_as_saved", lambda *_: None)
    maps = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kinds = dict(itertools.chain.from_iterable(found.items() for found in maps))
    published, refused = 0, set()
    for config, kind in kinds.items():
        try:
            with torch.device("meta"):
                model = (kind[0] if isinstance(kind, tuple) else kind)(config())
        except Exception:  # a config without usable defaults, or a missing package
            continue
        try:
            conversion.places_in(model, model_tensors(model))
            published += 1
        except ConfigError:
            refused.add(config.model_type)
    print(f"\n{published} models can be published, {len(refused)} are refused: {', '.join(sorted(refused))}")
    assert refused == REFUSED
