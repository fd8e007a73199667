"""Tensors that the served model holds in another dtype than the run: widened in place, or loaded whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from hubsync.apply.applier import Applier
from hubsync.apply.live import LayoutHints
from hubsync.errors import ReplicaPoisoned, ReplicaRefused
from hubsync.format.patch import TensorValues
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.bits import bits_of
from tests.support.toy import assert_same, memory, nudged, patch_between, position_of

View = dict[str, torch.Tensor]

TABLE = TensorTable(
    [
        TensorSpec("gate", (6, 8), "BF16"),
        TensorSpec("stacked", (2, 6, 8), "BF16"),
        TensorSpec("converted", (4, 8), "BF16"),
        TensorSpec("bias", (7,), "F32"),
        TensorSpec("decay", (5,), "F32"),
        TensorSpec("w", (64, 64), "BF16"),
    ]
)


class Model(nn.Module):
    """As vLLM's models: a router in float32, a bias in float32, Mamba's `A` computed in float32."""

    def __init__(self) -> None:
        super().__init__()
        shapes: list[tuple[str, tuple[int, ...], torch.dtype]] = [
            ("gate", (6, 8), torch.float32),
            ("stacked", (8, 12), torch.float32),  # transposed, two in one
            ("converted", (6, 8), torch.float32),  # padded
            ("bias", (7,), torch.float32),
            ("decay", (5,), torch.float32),
            ("w", (64, 64), torch.bfloat16),
        ]
        for name, shape, dtype in shapes:
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            match name:
                case "stacked":
                    for number, part in enumerate(tensor.unbind(0)):
                        self.stacked.data[:, 6 * number : 6 * number + 6].copy_(part.t())
                case "converted":
                    self.converted.data[:4] = tensor.to(torch.float32)
                case "decay":
                    self.decay.data.copy_(-torch.exp(tensor.float()))
                case _:
                    getattr(self, name).data.copy_(tensor)


def view(seed: int) -> View:
    generator = torch.Generator().manual_seed(seed)
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    return {spec.name: torch.randn(spec.shape, generator=generator).to(dtypes[spec.dtype]) for spec in TABLE}


V0 = view(0)
V1 = nudged(V0, 1, 0.3)
V2 = nudged(V1, 2, 0.3)
P0, P1, P2 = (position_of(version, tensors, TABLE) for version, tensors in enumerate((V0, V1, V2)))


def loaded(tensors: View) -> Model:
    model = Model()
    model.load_weights(tensors.items())
    return model


def applier_of(model: Model, masters: View = V0, share: float = 0.02) -> Applier:
    applier = Applier(model, TABLE, torch.device("cpu"), masters=masters, dense_share=share)
    assert applier.join([applier.inventory()]).hex == P0.digest
    applier.adopt(P0)
    return applier


def test_bfloat16_is_widened_in_place_and_small_computed_tensors_are_loaded_whole() -> None:
    applier = applier_of(loaded(V0))
    classes = {name: row["class"] for name, row in applier.layout().items()}
    assert classes == {
        "gate": "affine",
        "stacked": "affine",
        "converted": "table",
        "bias": "affine",
        "decay": "dense",
        "w": "affine",
    }
    assert applier.stale_parameters() == []


@pytest.mark.parametrize("absolute", [(), (0, 1, 2, 3, 4, 5), (1, 4)])
def test_every_commit_equals_a_fresh_load(absolute: tuple[int, ...]) -> None:
    model = loaded(V0)
    applier = applier_of(model)
    patch = patch_between(V0, V1, TABLE)
    patch |= {index: TensorValues(bits_of(V1[TABLE[index].name]).copy()) for index in absolute}
    applier.stage_patch(patch, P1)
    assert_same(memory(model), memory(loaded(V0)))
    applier.commit(P1)
    assert_same(memory(model), memory(loaded(V1)))
    assert applier.verify()
    applier.stage_view(V2, P2)
    applier.commit(P2)
    assert_same(memory(model), memory(loaded(V2)))
    assert applier.verify()
    applier.undo()
    assert_same(memory(model), memory(loaded(V1)))
    assert applier.verify()


def test_old_weights_of_widened_tensors_are_their_published_patterns() -> None:
    """Compact deltas are decoded against them."""
    old = applier_of(loaded(V0)).old_bits()
    for index, spec in enumerate(TABLE):
        rows, cols = (slice(0, size) for size in spec.matrix)
        assert (old.rectangle(index, rows, cols) == bits_of(V0[spec.name]).reshape(spec.matrix)).all(), spec.name


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """A kernel's layout of experts: pairs of rows, column by column."""
    experts, rows, columns = tensor.shape
    return tensor.reshape(experts, rows // 2, 2, columns).transpose(2, 3).contiguous().reshape(tensor.shape)


class Experts(nn.Module):
    """Served in float32, and permuted after loading, as vLLM for CPUs does."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, 4, 6), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.w.data[int(name)].copy_(tensor)


def packed_experts(tensors: View) -> Experts:
    model = Experts()
    model.load_weights(tensors.items())
    model.w.data.copy_(packed(model.w.data))
    return model


@pytest.mark.parametrize("absolute", [False, True])
def test_widened_tensors_are_followed_where_they_were_permuted_after_loading(absolute: bool) -> None:
    table = TensorTable([TensorSpec(str(number), (4, 6), "BF16") for number in range(3)])
    first = {str(number): torch.randn(4, 6).bfloat16() for number in range(3)}
    second = nudged(first, 1, 0.3)
    start, end = (position_of(version, tensors, table) for version, tensors in enumerate((first, second)))
    model = packed_experts(first)
    hints = LayoutHints(relayouts={"w": packed})
    applier = Applier(model, table, torch.device("cpu"), hints=hints)
    assert applier.join([applier.inventory()]).hex == start.digest
    applier.adopt(start)
    if absolute:
        applier.stage_view(second, end)
    else:
        applier.stage_patch(patch_between(first, second, table), end)
    applier.commit(end)
    assert_same(memory(model), memory(packed_experts(second)))
    assert applier.verify()
    applier.undo()
    assert_same(memory(model), memory(packed_experts(first)))
    model.w.data.view(torch.int32)[1, 2, 3] += 1
    with pytest.raises(ReplicaPoisoned):
        applier.verify()
    applier.heal(first, start)
    assert_same(memory(model), memory(packed_experts(first)))


def damage_upper(model: Model) -> None:
    model.gate.data[2, 3] *= 2


def damage_lower(model: Model) -> None:
    model.stacked.data.view(torch.int32)[2, 3] += 1


def damage_computed(model: Model) -> None:
    model.decay.data[1] *= 2


@pytest.mark.parametrize("damage", [damage_upper, damage_lower, damage_computed])
def test_any_flipped_bit_is_found_and_healed(damage: Callable[[Model], None]) -> None:
    model = loaded(V0)
    applier = applier_of(model)
    damage(model)
    with pytest.raises(ReplicaPoisoned):
        applier.verify()
    applier.heal(V0, P0)
    assert_same(memory(model), memory(loaded(V0)))
    assert applier.verify()


def test_a_value_that_was_loaded_in_another_precision_is_found_and_healed() -> None:
    """The run's digest is that of the masters; what the server loaded was computed from other numbers."""
    model = loaded({**V0, "decay": V0["decay"] + 2**-20})
    applier = applier_of(model)
    assert applier.stale_parameters() == ["decay"]
    before = memory(model)
    applier.stale_parameters()
    assert_same(memory(model), before)
    applier.poison("loaded in another precision")
    applier.heal(V0, P0)
    assert applier.stale_parameters() == []
    assert_same(memory(model), memory(loaded(V0)))


def test_more_than_a_small_share_is_refused_with_the_way_out() -> None:
    with pytest.raises(ReplicaRefused, match=r"^decay: the loader computes with it .*HUBSYNC_DENSE_FALLBACK=1"):
        Applier(loaded(V0), TABLE, torch.device("cpu"), masters=V0, dense_share=0.001).inventory()


def test_a_narrower_live_parameter_is_refused_with_the_way_out() -> None:
    model = loaded(V0)
    model.w = nn.Parameter(model.w.to(torch.float16), requires_grad=False)
    applier = Applier(model, TABLE, torch.device("cpu"), masters=V0, dense_share=0.02)
    assert applier.layout()["w"]["reason"] == "it is torch.bfloat16 in the run and torch.float16 in w"
    with pytest.raises(ReplicaRefused, match="--dtype"):
        applier.inventory()


class Both(nn.Module):
    """A float32 parameter that takes a bfloat16 tensor and a float32 one."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.zeros(8), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.both.data[:4].copy_(tensor) if name == "a" else self.both.data[4:].copy_(tensor)


def test_a_parameter_that_takes_two_published_dtypes_is_refused_with_a_way_out_that_works() -> None:
    table = TensorTable([TensorSpec("a", (4,), "BF16"), TensorSpec("b", (4,), "F32")])
    first = {"a": torch.randn(4).bfloat16(), "b": torch.randn(4)}
    with pytest.raises(ReplicaRefused, match=r"^b: both also takes tensors .*another dtype.*HUBSYNC_DENSE_FALLBACK=1"):
        Applier(Both(), table, torch.device("cpu")).inventory()
    assert_follows(Both, table, first)


class Halves(nn.Module):
    """Serves float16 in float32: the same numbers, and other bits."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(6), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in weights:
            self.w.data.copy_(tensor)


def test_float16_that_is_served_in_float32_is_loaded_whole() -> None:
    """Subnormal numbers too, and a negative zero."""
    table = TensorTable([TensorSpec("w", (6,), "F16")])
    assert_follows(Halves, table, {"w": torch.tensor([1.5, -0.0, 6e-8, 65504.0, -3e-6, 0.1]).half()})


def assert_follows(make: Callable[[], nn.Module], table: TensorTable, first: View) -> None:
    """With dense fallback, a commit and an undo leave what fresh loads leave."""

    def loaded(tensors: View) -> nn.Module:
        model = make()
        model.load_weights(tensors.items())  # type: ignore[operator]
        return model

    second = nudged(first, 1, 0.5)
    start, end = (position_of(version, tensors, table) for version, tensors in enumerate((first, second)))
    model = loaded(first)
    applier = Applier(model, table, torch.device("cpu"), masters=first)
    assert applier.join([applier.inventory()]).hex == start.digest
    applier.adopt(start)
    applier.stage_patch(patch_between(first, second, table), end)
    applier.commit(end)
    assert_same(memory(model), memory(loaded(second)))
    assert applier.verify()
    applier.undo()
    assert_same(memory(model), memory(loaded(first)))
