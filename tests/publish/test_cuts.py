"""Trainers that cut parameters themselves: what each rank holds is given as rectangles of published tensors.

`fused` makes a stand-in for a Megatron-Core model: its names, and its fused and cut parameters. test_megatron.py
has a real one.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hubsync import Cut, DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.chain.replay import replay
from hubsync.errors import ConfigError
from hubsync.publish.results import Published
from hubsync.publish.view.boxes import Box
from hubsync.publish.view.cuts import CutView
from tests.publish.test_ranks import follow, outcome
from tests.support.tiny import same_bits
from tests.support.training import device_of, run, watched

layout_of = runpy.run_path(str(Path(__file__).parents[2] / "examples/megatron/layout.py"))["layout_of"]

LAYERS, HIDDEN, HEADS, GROUPS, SIZE, INNER, WORDS = 2, 24, 8, 4, 4, 20, 37
CONFIG = SimpleNamespace(kv_channels=SIZE, num_query_groups=GROUPS, num_attention_heads=HEADS)


def checkpoint(seed: int) -> dict[str, torch.Tensor]:
    """The whole model under its published names."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (WORDS, HIDDEN), "lm_head.weight": (WORDS, HIDDEN)}
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.self_attn.q_proj.weight": (HEADS * SIZE, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": (GROUPS * SIZE, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": (GROUPS * SIZE, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, HEADS * SIZE),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
            f"{layer}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{layer}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER),
        }
    shapes["model.norm.weight"] = (HIDDEN,)
    return {name: torch.randn(shape, generator=random).bfloat16() for name, shape in shapes.items()}


def fused(whole: dict[str, torch.Tensor], tp: int, rank: int, stage: int, stages: int) -> torch.nn.Module:
    """What Megatron-Core holds of it on a rank of tensor parallelism, in a stage of the pipeline."""

    def module(**parts: Any) -> Any:
        made = torch.nn.Module()
        for name, part in parts.items():
            setattr(made, name, torch.nn.Parameter(part.clone()) if isinstance(part, torch.Tensor) else part)
        return made

    def words(name: str) -> Any:
        padded = torch.cat([whole[name], torch.full((tp * -(-WORDS // tp) - WORDS, HIDDEN), 7.0).bfloat16()])
        return module(weight=padded.chunk(tp)[rank])

    def layer(number: int) -> Any:
        part = {n.removeprefix(f"model.layers.{number}."): t for n, t in whole.items()}
        grouped = [part[f"self_attn.{p}_proj.weight"].view(GROUPS, -1, HIDDEN) for p in "qkv"]
        gate, up = (part[f"mlp.{p}_proj.weight"].chunk(tp)[rank] for p in ("gate", "up"))
        return module(
            layer_number=number + 1,
            input_layernorm=module(weight=part["input_layernorm.weight"]),
            self_attention=module(
                linear_qkv=module(weight=torch.cat(grouped, 1).chunk(tp)[rank].flatten(0, 1)),
                linear_proj=module(weight=part["self_attn.o_proj.weight"].chunk(tp, 1)[rank]),
                q_layernorm=None,
                k_layernorm=None,
            ),
            pre_mlp_layernorm=module(weight=part["post_attention_layernorm.weight"]),
            mlp=module(
                linear_fc1=module(weight=torch.cat([gate, up])),
                linear_fc2=module(weight=part["mlp.down_proj.weight"].chunk(tp, 1)[rank]),
            ),
        )

    first, last = stage == 0, stage == stages - 1
    own = range(LAYERS * stage // stages, LAYERS * (stage + 1) // stages)
    return module(
        config=CONFIG,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=False,
        embedding=module(word_embeddings=words("model.embed_tokens.weight")) if first else None,
        decoder=module(
            layers=torch.nn.ModuleList(map(layer, own)),
            final_layernorm=module(weight=whole["model.norm.weight"]) if last else None,
        ),
        output_layer=words("lm_head.weight") if last else None,
    )


def moved(seed: int) -> dict[str, torch.Tensor]:
    """The model after some steps: a few elements of each tensor change in each."""
    whole = checkpoint(0)
    for step in range(1, seed + 1):
        other = checkpoint(step)
        random = torch.Generator().manual_seed(step)
        for name, tensor in whole.items():
            chosen = torch.rand(tensor.shape, generator=random) < 0.2
            tensor[chosen] = other[name][chosen]
    return whole


def publishes(rank: int, address: str, tp: int, stages: int) -> tuple[list[Published], dict[str, int]]:
    """As an all-gather of Megatron's distributed optimizer writes parameters: nothing steps them here."""
    stage, tp_rank = rank % (tp * stages) // tp, rank % tp
    device = device_of(dist.get_world_size())
    model = fused(checkpoint(0), tp, tp_rank, stage, stages).to(device)
    layout = layout_of(vocabulary=WORDS, tp=tp, tp_rank=tp_rank)
    versions = []
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address), layout=layout) as engine:
        for step in (1, 2):
            now = fused(moved(step), tp, tp_rank, stage, stages)
            with torch.no_grad():
                for parameter, new in zip(model.parameters(), now.parameters(), strict=True):
                    parameter.copy_(new)
            with watched() as watch:
                versions.append(engine.publish(step).result())
        assert engine.publish(3).result().changed == 0
        engine.anchor()
    return versions, watch.collectives


def check(ranks: int, tp: int, stages: int, tmp_path: Path) -> list[Published]:
    outcomes = run(ranks, publishes, tmp_path / "run", tp, stages)
    versions, _ = outcomes[0]
    reader = ChainReader(LocalBucket(str(tmp_path / "run")), tmp_path / "cache")
    for version, step in zip(versions, (1, 2), strict=True):
        assert same_bits(replay(reader, reader.plan(None, version.version)).tensors, moved(step))
        assert version.changed == sum(int((moved(step)[name] != old).sum()) for name, old in moved(step - 1).items()), (
            "no change is published twice"
        )
    for others, collectives in outcomes:
        assert [other.position for other in others] == [version.position for version in versions]
        assert collectives.keys() == {"allgather_.default"}, "of outcomes, not of weights"
    anchor = reader.manifests()[-1]
    assert (anchor.kind, anchor.version) == ("anchor", 2)
    assert same_bits(follow(tmp_path / "run", tmp_path).tensors, moved(2))
    return versions


@pytest.mark.slow
def test_fused_parameters_of_tensor_parallel_ranks(tmp_path: Path) -> None:
    for version in check(2, 2, 1, tmp_path):
        assert all(share.changed for share in version.ranks)


@pytest.mark.slow
def test_stages_of_a_pipeline(tmp_path: Path) -> None:
    check(2, 1, 2, tmp_path)


@pytest.mark.long
@pytest.mark.slow
def test_replicas_of_tensor_parallel_ranks_share_the_work(tmp_path: Path) -> None:
    for version in check(4, 2, 1, tmp_path):
        assert all(share.changed for share in version.ranks)


def test_one_process_may_give_a_tensor_in_any_order(tmp_path: Path) -> None:
    """Columns that interleave, a transposed part, and compact deltas, for which the old weights are put in order."""
    columns, turned = torch.randn(2, 3, 5), torch.randn(4, 7)

    def cuts(_: Any) -> Iterator[Cut]:
        for number, rows in enumerate(columns):
            yield Cut("columns", rows.t(), (5, 6), (0, 3 * number))
        yield Cut("turned", turned.t()[:3], (7, 4))
        yield Cut("turned", turned.t()[3:], (7, 4), (3, 0))

    config = SyncConfig(bucket=str(tmp_path / "run"), encoding="compact")
    with DeltaWeightTransferEngine(torch.nn.Module(), None, config, layout=cuts) as engine:
        columns[1, 2, 3] += 1
        columns[0, 1] += 1
        turned[2] -= 1
        assert engine.publish().result().changed == 13
    view = follow(tmp_path / "run", tmp_path)
    assert same_bits(
        view.tensors, {"columns": torch.cat([*columns], 0).t().bfloat16(), "turned": turned.t().bfloat16()}
    )


# --- refused, on all ranks, before anything is published -----------------------------------------------------

W = torch.zeros(4, 3)
REFUSED: dict[str, tuple[list[Callable[[], Iterable[Cut]]], str]] = {
    "missing": (
        [lambda: [Cut("w", W[:2], (4, 3))], lambda: [Cut("w", W[3:], (4, 3), (3, 0))]],
        r"the ranks together hold 9 of the 12 elements of w \[4, 3\] \(\[2, 3\] at \[0, 0\], \[1, 3\] at \[3, 0\]\)",
    ),
    "overlap": (
        [lambda: [Cut("w", W[:3], (4, 3))], lambda: [Cut("w", W[2:], (4, 3), (2, 0))]],
        r"\[3, 3\] at \[0, 0\] of rank 0 and \[2, 3\] at \[2, 0\] of rank 1 of w \[4, 3\] overlap",
    ),
    "shapes": (
        [lambda: [Cut("w", W)], lambda: [Cut("w", W[:, :2])]],
        r"rank 1 gives w the shape \[4, 2\], and another rank \[4, 3\]",
    ),
    "values": ([lambda: [Cut("w", W)], lambda: [Cut("w", W + 1)]], "w differs between ranks 0 and 1"),
    "raises": ([lambda: [Cut("w", W)], lambda: {}["rank 1"]], "rank 1"),
    "no layout": ([lambda: [Cut("w", W)]], "some ranks have a layout, and others have none: give all ranks one"),
}


def is_refused(rank: int, address: str, why: str) -> tuple[str, str] | None:
    layouts = REFUSED[why][0]
    layout = (lambda _: layouts[rank]()) if rank < len(layouts) else None
    model, config = torch.nn.Linear(3, 4), SyncConfig(bucket=address)
    return outcome(lambda: DeltaWeightTransferEngine(model, None, config, layout=layout))


def are_refused(rank: int, directory: str) -> list[tuple[str, str] | None]:
    return [is_refused(rank, f"{directory}/{why}", why) for why in REFUSED]


@pytest.mark.slow
def test_ranks_that_contradict_each_other_are_refused_together(tmp_path: Path) -> None:
    first, second = run(2, are_refused, tmp_path)
    assert first == second
    for why, (kind, message), (_, expected) in zip(REFUSED, first, REFUSED.values(), strict=True):
        assert kind == ("KeyError" if why == "raises" else "ConfigError")
        assert re.search(expected, message), message
        assert not (tmp_path / why).exists()


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([], "gives no tensors"),
        ([W], "a layout gives hubsync.Cut, not Tensor"),
        ([Cut("w", W, (4, 3), (1, 0))], r"cut \[4, 3\] at \[1, 0\] of w is not inside of its shape \[4, 3\]"),
        ([Cut("w", W, (12,))], "not inside of its shape"),
        ([Cut("w", W, (4, 3), (0,))], "not inside of its shape"),
        ([Cut("w", W[:2], (4, 3)), Cut("w", W[2:], (5, 3), (2, 0))], r"two cuts of w give it the shapes"),
        ([Cut("w", W[:2], (4, 3)), Cut("w", W[2:].half(), (4, 3), (2, 0))], "several dtypes or devices"),
        ([Cut("w", W.int())], r"torch\.int32 on cpu: only real weights"),
        ([Cut("w", W.to("meta"))], "on meta: only real weights"),
        ([Cut("w", W), Cut("w", W)], r"of rank 0 and .* of rank 0 of w \[4, 3\] overlap"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(cuts: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        DeltaWeightTransferEngine(
            torch.nn.Module(), None, SyncConfig(bucket=str(tmp_path / "run")), layout=lambda _: cuts
        )
    assert not (tmp_path / "run").exists()


def test_a_layout_must_stay_what_it_was(tmp_path: Path) -> None:
    rows = 2

    def cuts(_: Any) -> list[Cut]:
        return [Cut("w", W[:rows], (4, 3)), Cut("w", W[rows:].t().contiguous().t(), (4, 3), (rows, 0))]

    with DeltaWeightTransferEngine(
        torch.nn.Module(), None, SyncConfig(bucket=str(tmp_path / "run")), layout=cuts
    ) as engine:
        rows = 3
        assert engine.publish().result().changed == 0, "the same elements in other cuts"
        cuts_before, rows = engine._publisher._view._layout, 2
        engine._publisher._view._layout = lambda _: [Cut("w", W[:rows], (4, 3))]
        with pytest.raises(ConfigError, match=r"w is held in this process as \[2, 3\] instead of \[4, 3\]"):
            engine.publish()
        engine._publisher._view._layout = cuts_before


def test_empty_cuts_are_ignored() -> None:
    view = CutView(lambda _: [Cut("w", W[:0], (4, 3), (9, 0)), Cut("w", W)], torch.nn.Module())
    assert view.tensors()["w"].boxes == (Box((0, 0), (4, 3)),)
