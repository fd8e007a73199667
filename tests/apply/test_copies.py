"""Hidden copies of weights: what attaching refuses, and what it must not take for one. Kernels here are stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from hubsync.apply.coordinate_map import build_map
from hubsync.apply.copies import find_copies
from hubsync.apply.live import Derived, LayoutHints
from hubsync.errors import ReplicaRefused
from hubsync.format.table import TensorSpec, TensorTable
from vllm_plugin.reachable import reachable_tensors

SHAPES = {"qkv.weight": (96, 64), "experts.weight": (4, 48, 64), "sinks": (4,), "norm.weight": (64,)}
GENERATOR = torch.Generator().manual_seed(1)


def weights() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, generator=GENERATOR).to(torch.bfloat16) for name, shape in SHAPES.items()}


def shuffled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1)[torch.randperm(tensor.numel(), generator=GENERATOR)]


def packed(weight: torch.Tensor) -> torch.Tensor:
    """As CPU kernels pack matrices: pairs of rows, so that no more than 48 elements stay together."""
    rows, columns = weight.shape
    return weight.reshape(rows // 2, 2, columns).transpose(1, 2).contiguous()


COPIES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], torch.Tensor]]] = {
    "a cast": ("qkv.weight", lambda all: all["qkv.weight"].float()),
    "a few numbers": ("sinks", lambda all: all["sinks"].float()),
    "a few numbers in another order": ("sinks", lambda all: all["sinks"].float().flip(0)),
    "a vector": ("norm.weight", lambda all: all["norm.weight"].clone()),
    "transposed": ("qkv.weight", lambda all: all["qkv.weight"].t().contiguous()),
    "flat": ("qkv.weight", lambda all: all["qkv.weight"].t().reshape(-1)),
    "any permutation": ("qkv.weight", lambda all: shuffled(all["qkv.weight"])),
    "packed in pairs": ("qkv.weight", lambda all: packed(all["qkv.weight"])),
    "a part": ("qkv.weight", lambda all: all["qkv.weight"][32:64].clone()),
    "absorbed: every other row of heads": (
        "qkv.weight",
        lambda all: all["qkv.weight"].view(3, 32, 64)[:, :16].permute(0, 2, 1).contiguous(),
    ),
    "with padding": ("qkv.weight", lambda all: nn.functional.pad(all["qkv.weight"], (0, 64, 0, 32))),
    "swapped halves": ("experts.weight", lambda all: all["experts.weight"].roll(24, dims=1)),
    "one expert": ("experts.weight", lambda all: all["experts.weight"][2].float()),
    "two together": ("qkv.weight", lambda all: torch.cat([all["qkv.weight"], all["experts.weight"].flatten(0, 1)])),
    "a strided view of a larger tensor": (
        "qkv.weight",
        lambda all: torch.zeros(96, 2, 64, dtype=torch.bfloat16)[:, 1].copy_(all["qkv.weight"]),
    ),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_found_with_its_source(kind: str) -> None:
    followed = weights()
    source, make = COPIES[kind]
    reachable = [("cache", torch.randn(500, 64)), *followed.items(), ("impl.copy", make(followed))]
    found = find_copies(reachable, followed, [])
    assert [(copy.path, copy.source) for copy in found] == [("impl.copy", source)]


def test_a_copy_of_float32_weights_in_bfloat16_is_found() -> None:
    weight = torch.randn(64, 32)
    assert find_copies([("impl.copy", weight.t().to(torch.bfloat16).contiguous())], {"w": weight}, [])


def rotary_cache() -> torch.Tensor:
    angles = torch.outer(torch.arange(512.0), 10000 ** (-torch.arange(0, 64, 2) / 64))
    return torch.cat([angles.cos(), angles.sin()], 1).to(torch.bfloat16)


def test_what_is_no_copy_is_left_alone() -> None:
    followed = weights() | {"ones": torch.ones(64, dtype=torch.bfloat16), "scalar": torch.tensor([0.5])}
    others = {
        "rotary": rotary_cache(),
        "ones": torch.ones(64),
        "zeros": torch.zeros(96, 64),
        "scale": torch.tensor(0.5),
        "empty": torch.empty(0),
        "random": torch.randn(96, 64, generator=GENERATOR).to(torch.bfloat16),
        "numbers": torch.arange(64),
        "meta": torch.empty(96, 64, device="meta"),
        "alias": followed["qkv.weight"].view(-1)[64:],
        "eight bits": torch.zeros(96, 64, dtype=torch.float8_e4m3fn),
    }
    assert find_copies(others.items(), followed, []) == []


def test_weights_of_a_random_model_are_no_copies_of_each_other() -> None:
    """With values of few digits, as small models in tests have them."""
    coarse = {f"layer.{n}": torch.randn(64, 64, generator=GENERATOR).to(torch.bfloat16) * 0.02 for n in range(20)}
    other = {f"other.{n}": torch.randn(64, 64, generator=GENERATOR).to(torch.bfloat16) * 0.02 for n in range(20)}
    assert find_copies(other.items(), coarse, []) == []


# --- when a server attaches -----------------------------------------------------------------------------


class Impl:
    """Stands for an object of the engine that is no module: FlashInfer's attention keeps its sinks so."""

    __module__ = "vllm.stand_in"

    def __init__(self, **tensors: torch.Tensor):
        self.__dict__ |= tensors


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tensors = nn.ParameterDict(
            {name.replace(".", "_"): nn.Parameter(tensor, requires_grad=False) for name, tensor in weights().items()}
        )
        self.impl: Any = None

    def load_weights(self, pairs: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in pairs:
            self.tensors[name.replace(".", "_")].data.copy_(tensor)


TABLE = TensorTable([TensorSpec(name, shape, "BF16") for name, shape in SHAPES.items()])


def hints(model: nn.Module, **derived: Derived) -> LayoutHints:
    return LayoutHints({}, derived, (), lambda: reachable_tensors(model))


def test_a_server_with_a_hidden_copy_is_refused_before_a_write() -> None:
    model = Model()
    build_map([model], TABLE, hints(model))
    model.impl = Impl(sinks=model.tensors["sinks"].detach().float())
    with pytest.raises(
        ReplicaRefused, match=r"^impl\.sinks: this server computes with a copy of tensors\.sinks there,"
    ):
        build_map([model], TABLE, hints(model))


def test_a_captured_copy_is_reached() -> None:
    model = Model()
    matrix = model.tensors["qkv_weight"].detach().t().contiguous()

    def multiply(x: torch.Tensor) -> torch.Tensor:
        return x @ matrix

    multiply.__module__ = "vllm.stand_in"
    model.impl = multiply
    with pytest.raises(ReplicaRefused, match=r"^impl\.matrix: "):
        build_map([model], TABLE, hints(model))


def test_a_parameter_that_is_computed_again_is_no_hidden_copy() -> None:
    model = Model()
    model.register_parameter("W_UV", nn.Parameter(model.tensors["qkv_weight"].detach().t().contiguous(), False))
    rule = Derived(("tensors.qkv_weight",), lambda: None)
    build_map([model], TABLE, hints(model, W_UV=rule))


def test_a_plain_attribute_is_a_hidden_copy_even_if_a_rule_has_its_name() -> None:
    """Only registered parameters are computed again."""
    model = Model()
    model.W_UV = model.tensors["qkv_weight"].detach().t().contiguous()
    rule = Derived(("tensors.qkv_weight",), lambda: None)
    with pytest.raises(ReplicaRefused, match=r"^W_UV: "):
        build_map([model], TABLE, hints(model, W_UV=rule))


def test_a_buffer_with_a_cast_is_a_hidden_copy() -> None:
    model = Model()
    model.register_buffer("norm_f32", model.tensors["norm_weight"].detach().float())
    with pytest.raises(ReplicaRefused, match=r"^norm_f32: this server computes with a copy of tensors\.norm_weight"):
        build_map([model], TABLE, hints(model))


def test_a_draft_that_loads_a_parameter_of_its_own_under_the_same_name_has_no_hidden_copy() -> None:
    model, draft = Model(), Model()
    draft.tensors = nn.ParameterDict(
        {"norm_weight": nn.Parameter(model.tensors["norm_weight"].detach().clone(), False)}
    )
    draft.load_weights = lambda pairs: draft.tensors["norm_weight"].data.copy_(dict(pairs)["norm.weight"])  # type: ignore[method-assign]
    both = LayoutHints(reachable=lambda: [*reachable_tensors(model), *reachable_tensors(draft)])
    coordinates = build_map([model, draft], TABLE, both)
    assert len(coordinates.regions[TABLE.index_of("norm.weight")]) == 2
