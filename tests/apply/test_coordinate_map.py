"""The coordinate map of hand-made models: small modules that load weights as real loaders do."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hubsync.apply.applier import Applier
from hubsync.apply.coordinate_map import CoordinateMap, build_map
from hubsync.apply.live import Derived, LayoutHints
from hubsync.apply.regions import Block, Scatter, block, overlap
from hubsync.errors import ReplicaPoisoned, ReplicaRefused
from hubsync.format.table import TensorSpec, TensorTable
from tests.support.toy import assert_same, memory, nudged, patch_between, position_of

Weights = Iterable[tuple[str, torch.Tensor]]


class Model(nn.Module):
    """Parameters by name, and a `load_weights` made of one function per checkpoint name."""

    def __init__(self, loaders: dict[str, Callable[[Model, torch.Tensor], object]], **shapes: tuple[int, ...]):
        super().__init__()
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
            self.register_parameter(name, nn.Parameter(values.to(torch.bfloat16), requires_grad=False))
        self.loaders = loaders

    def load_weights(self, weights: Weights) -> None:
        for name, tensor in weights:
            if name in self.loaders:
                self.loaders[name](self, tensor)


def table_of(*rows: tuple[str, tuple[int, ...]], dtype: str = "BF16") -> TensorTable:
    return TensorTable([TensorSpec(name, shape, dtype) for name, shape in rows])


def checkpoint(table: TensorTable) -> dict[str, torch.Tensor]:
    """Random bits: NaN payloads, infinities and both zeros included."""
    generator = torch.Generator().manual_seed(3)
    return {
        spec.name: torch.randint(-(1 << 15), 1 << 15, spec.shape, generator=generator, dtype=torch.int16).view(
            torch.bfloat16
        )
        for spec in table
    }


def read_back(coordinates: CoordinateMap, index: int) -> torch.Tensor:
    """The table tensor as the map finds it in live memory, as int16 patterns."""
    flat = torch.zeros(coordinates.table[index].numel, dtype=torch.int16)
    for region in coordinates.regions[index]:
        for piece in region.pieces(7):
            ranks = np.arange(piece.numel)
            flat[torch.from_numpy(piece.indices(ranks))] = coordinates.storages[piece.storage].gather(piece)
    return flat


def assert_exact(model: Model, table: TensorTable) -> CoordinateMap:
    """Map first, load real weights afterwards: every element must be found where the loader put it."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    coordinates = build_map([model], table)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.int16), before[name].view(torch.int16)), "the dry run wrote"
    weights = checkpoint(table)
    with torch.no_grad():
        model.load_weights(weights.items())
    for index, spec in enumerate(table):
        expected = weights[spec.name].reshape(-1).view(torch.int16)
        assert torch.equal(read_back(coordinates, index), expected), spec.name
        indices = np.arange(spec.numel)[::3]
        found = np.concatenate([region.locate(indices)[0] for region in coordinates.regions[index]])
        assert sorted(found) == list(range(len(indices))), "every index is located exactly once"
        for region in coordinates.regions[index]:
            positions, offsets = region.locate(indices)
            live = coordinates.storages[region.storage].bits[torch.from_numpy(offsets)]
            assert torch.equal(live, expected[torch.from_numpy(indices[positions])])
    return coordinates


def attach(model: nn.Module, table: TensorTable) -> None:
    """Map the model and check the map, as a server of one worker does."""
    applier = Applier(model, table, torch.device("cpu"))
    applier.join([applier.inventory()])


def rows(name: str, first: int, last: int) -> Callable[[Model, torch.Tensor], object]:
    return lambda model, tensor: getattr(model, name).data[first:last].copy_(tensor)


def test_fused_projection() -> None:
    model = Model({"q": rows("qkv", 0, 4), "k": rows("qkv", 4, 6), "v": rows("qkv", 6, 8)}, qkv=(8, 3))
    coordinates = assert_exact(model, table_of(("q", (4, 3)), ("k", (2, 3)), ("v", (2, 3))))
    assert [len(regions) for regions in coordinates.regions] == [1, 1, 1]
    assert all(region.contiguous for regions in coordinates.regions for region in regions)


def test_one_checkpoint_tensor_split_over_two_parameters() -> None:
    def load(model: Model, tensor: torch.Tensor) -> None:
        gate, up = tensor.chunk(2, dim=0)
        model.gate.data.copy_(gate)
        model.up.data.copy_(up)

    assert_exact(Model({"gate_up": load}, gate=(2, 5), up=(2, 5)), table_of(("gate_up", (4, 5))))


def test_padded_vocabulary() -> None:
    def load(model: Model, tensor: torch.Tensor) -> None:
        model.embed.data[:5].copy_(tensor)
        model.embed.data[5:].fill_(0)

    assert_exact(Model({"embed": load}, embed=(8, 4)), table_of(("embed", (5, 4))))


def test_zeroing_before_loading_is_harmless() -> None:
    def load(model: Model, tensor: torch.Tensor) -> None:
        model.w.data.zero_()
        model.w.data.copy_(tensor)

    assert_exact(Model({"w": load}, w=(3, 4)), table_of(("w", (3, 4))))


def test_tied_parameter_is_one_storage() -> None:
    model = Model({"embed": rows("embed", 0, 6)}, embed=(6, 4))
    model.head = model.embed
    coordinates = assert_exact(model, table_of(("embed", (6, 4))))
    assert coordinates.storages[0].names == ["embed", "head"]


def test_transposed_and_columns() -> None:
    def load(model: Model, tensor: torch.Tensor) -> None:
        model.w.data[:, 1:4].copy_(tensor.t())
        model.w.data[:, 0].fill_(0)

    coordinates = assert_exact(Model({"w": load}, w=(5, 4)), table_of(("w", (3, 5))))
    assert isinstance(coordinates.regions[0][0], Block)


def test_scalar_and_reshaped() -> None:
    loaders = {
        "scale": lambda model, tensor: model.scale.data.copy_(tensor.reshape(1)),
        "w": lambda model, tensor: model.w.data.copy_(tensor.view(4, 6)),
    }
    assert_exact(Model(loaders, scale=(1,), w=(4, 6)), table_of(("scale", ()), ("w", (2, 2, 6))))


@pytest.mark.parametrize(
    "move",
    [
        lambda t: t.flip(0),
        lambda t: t[torch.tensor([2, 0, 3, 1])],
        lambda t: t.index_select(1, torch.tensor([3, 1, 0, 2, 4, 5])),
        lambda t: torch.cat([t[2:], t[:2]]),
        lambda t: t.t().contiguous().view(6, 4).t(),
        lambda t: t.roll(1, 0),
        lambda t: t.to("cpu").clone().contiguous(),
    ],
)
def test_permuting_loaders(move: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = Model({"w": lambda model, tensor: model.w.data.copy_(move(tensor))}, w=(4, 6))
    assert_exact(model, table_of(("w", (4, 6))))


def test_loader_that_concatenates_two_tensors() -> None:
    class Buffering(Model):
        def load_weights(self, weights: Weights) -> None:
            tensors = dict(weights)
            self.w.data.copy_(torch.cat([tensors["b"], tensors["a"]]))

    coordinates = assert_exact(Buffering({}, w=(5, 3)), table_of(("a", (2, 3)), ("b", (3, 3))))
    assert all(isinstance(region, Scatter) for regions in coordinates.regions for region in regions)


def test_padding_inside_a_tensor() -> None:
    def load(model: Model, tensor: torch.Tensor) -> None:
        model.w.data.copy_(nn.functional.pad(tensor, (0, 2)))

    assert_exact(Model({"w": load}, w=(3, 6)), table_of(("w", (3, 4))))


def composed(model: Model, tensor: torch.Tensor) -> None:
    model.w.data.copy_(tensor)
    model.w.data.copy_(-torch.exp(model.w.data))


def through_a_buffer(model: Model, tensor: torch.Tensor) -> None:
    buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
    buffer.copy_(tensor)
    model.w.data.copy_(buffer)


def into_an_attribute(model: Model, tensor: torch.Tensor) -> None:
    model.w.data.copy_(tensor)
    model.cached.copy_(torch.ones(4, 6))


def onto_itself(model: Model, tensor: torch.Tensor) -> None:
    model.w.data.as_strided((4, 6), (1, 1)).copy_(tensor)


def two_places(model: Model, tensor: torch.Tensor) -> None:
    model.w.data.copy_(tensor)
    model.v.data.copy_(tensor)


def wiped(model: Model, tensor: torch.Tensor) -> None:
    model.w.data.copy_(tensor)
    model.w.data[3:].zero_()


def replaced(model: Model, tensor: torch.Tensor) -> None:
    model.w.data.copy_(tensor)
    model.w = nn.Parameter(torch.zeros(4, 6, dtype=torch.bfloat16), requires_grad=False)


def swallowed(model: Model, tensor: torch.Tensor) -> None:
    try:
        model.w.data.copy_(tensor + 1)
    except Exception:
        pass


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (lambda model, tensor: model.w.data.copy_(tensor + 1), r"^w: the loader computes with it \(aten.add"),
        (lambda model, tensor: model.w.data.copy_(tensor.half()), "^w: the loader converts it"),
        (lambda model, tensor: model.w.data.fill_(tensor.max().item()), "^w: the loader computes"),
        (lambda model, tensor: model.w.data.copy_(tensor[tensor > 0]), "^w: the loader computes"),
        (lambda model, tensor: tensor.mul_(2), "^w: the loader stores it"),
        (lambda model, tensor: model.w.data.add_(tensor), "^w: its loader computes its values"),
        (lambda model, tensor: model.w.data[:2].copy_(tensor[:2]), "^w: .*only 12 of 24"),
        (lambda model, tensor: model.w.data.copy_(tensor[:1]), "^w: .*more than one place"),
        (lambda model, tensor: None, "^w: the tensors of the run feed no element of this parameter"),
        (lambda model, tensor: model.w.data.view(torch.float16).copy_(tensor), "^w: it is torch.bfloat16 in the run"),
        (lambda model, tensor: model.missing.copy_(tensor), "^w: .*stopped after taking it: AttributeError"),
        (composed, "^w: its loader computes its values"),
        (through_a_buffer, "^w: the loader stores it"),
        (into_an_attribute, "^w: its loader writes to a tensor that is no parameter"),
        (onto_itself, "^w: two elements land in one place of w"),
        (two_places, "^w, v: two elements land in one place of v"),
        (wiped, "^w: its loader overwrites part of it"),
        (replaced, "^w: the model's load_weights replaces"),
        (swallowed, "^w: the loader computes with it"),
    ],
)
def test_unmappable_tensors_are_refused_by_name(load: Callable[[Model, torch.Tensor], object], reason: str) -> None:
    model = Model({"w": load, "v": rows("v", 0, 4)}, w=(4, 6), v=(4, 6))
    model.cached = torch.zeros(4, 6)  # no parameter, no buffer: such as a key-value cache
    live = model.w
    before = live.clone()
    with pytest.raises(ReplicaRefused, match=reason):
        attach(model, table_of(("w", (4, 6)), ("v", (4, 6))))
    assert torch.equal(live, before)
    assert not model.cached.any()


def test_a_loader_may_use_scratch_memory() -> None:
    def load(model: Model, tensor: torch.Tensor) -> None:
        order = torch.zeros(4, dtype=torch.int64)
        order[:] = torch.tensor([3, 1, 0, 2])
        model.w.data.copy_(tensor[order])

    assert_exact(Model({"w": load}, w=(4, 6)), table_of(("w", (4, 6))))


def test_two_tensors_in_one_place_are_refused() -> None:
    model = Model({"a": rows("w", 0, 3), "b": rows("w", 2, 5)}, w=(5, 2))
    with pytest.raises(ReplicaRefused, match=r"^a, b: two elements land in one place of w"):
        attach(model, table_of(("a", (3, 2)), ("b", (3, 2))))


def test_interleaved_tensors_do_not_overlap() -> None:
    loaders = {
        "even": lambda model, tensor: model.w.data[::2].copy_(tensor),
        "odd": lambda model, tensor: model.w.data[1::2].copy_(tensor),
    }
    assert_exact(Model(loaders, w=(6, 2)), table_of(("even", (3, 2)), ("odd", (3, 2))))


def test_parameter_that_no_tensor_feeds_is_refused() -> None:
    model = Model({"q": rows("qkv", 0, 4)}, qkv=(8, 3))
    with pytest.raises(ReplicaRefused, match=r"^qkv: the tensors of the run feed only 12 of 24 elements"):
        attach(model, table_of(("q", (4, 3))))
    model = Model({"q": rows("qkv", 0, 8)}, qkv=(8, 3), extra=(2,))
    with pytest.raises(ReplicaRefused, match=r"^extra: the tensors of the run feed no element"):
        attach(model, table_of(("q", (8, 3))))


def test_a_tower_that_the_run_leaves_out_stays_and_is_still_verified() -> None:
    """Only the text model is trained: its checkpoint has more than the run."""
    model = Model({"w": rows("w", 0, 8)}, w=(8, 3), tower=(2, 4), projector=(4,))
    table = table_of(("w", (8, 3)))
    weights = checkpoint(table)
    model.load_weights(weights.items())
    hints = LayoutHints(apart=[frozenset({"tower", "projector"})])
    applier = Applier(model, table, torch.device("cpu"), hints=hints)
    start, after = position_of(0, weights, table), nudged(weights, 5)
    assert applier.join([applier.inventory()]).hex == start.digest
    applier.adopt(start)
    target = position_of(1, after, table)
    applier.stage_patch(patch_between(weights, after, table), target)
    applier.commit(target)
    assert applier.verify()
    model.tower.data[0, 0] += 1
    with pytest.raises(ReplicaPoisoned, match="tower"):
        applier.verify()
    with pytest.raises(ReplicaPoisoned, match="tower"):  # the run does not hold it
        applier.heal(after, target)


def test_a_part_that_the_run_has_in_part_is_refused() -> None:
    model = Model({"w": rows("w", 0, 8), "tower": rows("tower", 0, 2)}, w=(8, 3), tower=(2, 4), projector=(4,))
    hints = LayoutHints(apart=[frozenset({"tower", "projector"})])
    with pytest.raises(ReplicaRefused, match=r"^projector: the tensors of the run feed no element"):
        build_map([model], table_of(("w", (8, 3)), ("tower", (2, 4))), hints)


def test_other_dtype_is_refused() -> None:
    model = Model({"w": rows("w", 0, 4)}, w=(4, 6))
    with pytest.raises(ReplicaRefused, match=r"^w: it is torch.float32 in the run and torch.bfloat16 in w"):
        attach(model, table_of(("w", (4, 6)), dtype="F32"))


def test_a_moved_parameter_is_detected() -> None:
    model = Model({"w": rows("w", 0, 4)}, w=(4, 6))
    model.register_buffer("cache", torch.ones(3))
    coordinates = build_map([model], table_of(("w", (4, 6))))
    assert coordinates.moved() is None
    model.cache = model.cache.double()  # a buffer that no tensor of the run feeds
    assert coordinates.moved() is None
    model.w = nn.Parameter(model.w.clone(), requires_grad=False)
    assert coordinates.moved() == "w"


# --- what happened after loading


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """A kernel's layout: within each expert, 2 x 2 tiles, of 16-bit elements."""
    experts, rows, columns = tensor.shape
    tiles = tensor.reshape(experts, rows // 2, 2, columns // 2, 2)
    return tiles.permute(0, 3, 1, 4, 2).contiguous().reshape(tensor.shape)


def experts_model() -> tuple[Model, TensorTable]:
    loaders = {
        f"experts.{number}": lambda model, tensor, number=number: model.w.data[number].copy_(tensor)
        for number in range(3)
    }
    return Model(loaders, w=(3, 4, 6)), table_of(*((f"experts.{number}", (4, 6)) for number in range(3)))


def test_a_permutation_after_loading_is_followed() -> None:
    model, table = experts_model()
    coordinates = build_map([model], table, LayoutHints(relayouts={"w": packed}))
    weights = checkpoint(table)
    model.load_weights(weights.items())
    model.w.data.copy_(packed(model.w.data))
    for index, spec in enumerate(table):
        assert torch.equal(read_back(coordinates, index), weights[spec.name].reshape(-1).view(torch.int16))
    assert {row["class"] for row in coordinates.layout().values()} == {"relayout"}


@pytest.mark.parametrize("transform", [lambda t: t + 1, lambda t: t.flip(0), lambda t: t[:, :1].expand_as(t)])
def test_a_transform_that_does_more_than_permute_an_expert_is_refused(
    transform: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    model, table = experts_model()
    with pytest.raises(ReplicaRefused, match=r"^w: its elements are mixed or changed after loading"):
        build_map([model], table, LayoutHints(relayouts={"w": transform}))


def test_padding_that_was_added_after_loading() -> None:
    model = Model({"w": rows("w", 0, 3)}, w=(4, 6))
    table = table_of(("w", (3, 6)))
    model.w.data[3:] = 0
    attach(model, table)
    model.w.data[3, 5] = 1
    with pytest.raises(ReplicaRefused, match=r"^w: the tensors of the run feed only 18 of 24 elements"):
        attach(model, table)


def test_derived_parameters_are_computed_again_unless_they_are_views() -> None:
    model = Model({"w": rows("w", 0, 4)}, w=(4, 6), copy=(6, 4))
    model.view = nn.Parameter(model.w.data[1:3], requires_grad=False)
    table = table_of(("w", (4, 6)))
    with pytest.raises(ReplicaRefused, match=r"^copy: the tensors of the run feed no element"):
        build_map([model], table)

    def refresh() -> None:
        model.copy.data.copy_(model.w.data.t())

    derived = Derived(("w",), refresh)
    applier = Applier(
        model,
        table,
        torch.device("cpu"),
        hints=LayoutHints(derived={"copy": derived, "view": Derived(("w",), refresh)}),
    )
    assert applier.derived == ["copy"]
    before, after = checkpoint(table), {"w": torch.ones(4, 6, dtype=torch.bfloat16)}
    model.load_weights(before.items())
    refresh()
    start, target = position_of(0, before, table), position_of(1, after, table)
    assert applier.join([applier.inventory()]).hex == start.digest
    applier.adopt(start)
    applier.stage_patch(patch_between(before, after, table), target)
    applier.commit(target)
    assert torch.equal(model.copy, after["w"].t())
    applier.undo()
    assert torch.equal(model.copy.view(torch.int16), before["w"].t().view(torch.int16))


# --- tensors that are loaded whole


def test_dense_fallback_loads_refused_tensors_whole() -> None:
    """A loader that computes: its tensor's values are kept aside, and go through it at every commit."""

    def decay(model: Model, tensor: torch.Tensor) -> None:
        model.decay.data.copy_(-torch.exp(tensor))

    model = Model({"decay": decay, "w": rows("w", 0, 4)}, decay=(5,), w=(4, 6))
    table = table_of(("decay", (5,)), ("w", (4, 6)))
    generator = torch.Generator().manual_seed(0)
    before = {spec.name: torch.randn(spec.shape, generator=generator).bfloat16() for spec in table}
    after = {name: tensor * 2 for name, tensor in before.items()}
    model.load_weights(before.items())
    with pytest.raises(ReplicaRefused, match=r"^decay: the loader computes with it \(aten.exp"):
        Applier(model, table, torch.device("cpu")).inventory()
    applier = Applier(model, table, torch.device("cpu"), masters=before)
    assert {name: row["class"] for name, row in applier.layout().items()} == {"decay": "dense", "w": "affine"}
    start, target = position_of(0, before, table), position_of(1, after, table)
    assert applier.join([applier.inventory()]).hex == start.digest
    applier.adopt(start)
    untouched = memory(model)
    applier.stage_patch(patch_between(before, after, table), target)
    assert_same(memory(model), untouched)
    applier.commit(target)
    assert torch.equal(model.decay, -torch.exp(after["decay"]))
    assert torch.equal(model.w, after["w"])
    assert applier.verify()
    applier.undo()
    assert_same(memory(model), untouched)
    assert applier.verify()
    model.decay.data[0] = 0
    with pytest.raises(ReplicaPoisoned):
        applier.verify()
    applier.heal(after, target)
    assert torch.equal(model.decay, -torch.exp(after["decay"]))


def test_every_refused_tensor_has_its_own_reason() -> None:
    loaders = {
        "a": lambda model, tensor: model.a.data.copy_(tensor + 1),
        "b": lambda model, tensor: model.b.data.copy_(tensor),
        "c": lambda model, tensor: model.c.data.fill_(tensor.max().item()),
    }
    model = Model(loaders, a=(4,), b=(4,), c=(4,))
    coordinates = build_map([model], table_of(("a", (4,)), ("b", (4,)), ("c", (4,))))
    layout = coordinates.layout()
    assert [layout[name]["class"] for name in "abc"] == ["refused", "affine", "refused"]
    assert "computes with it" in str(layout["a"]["reason"])
    assert "aten._local_scalar_dense" in str(layout["c"]["reason"]) or "aten.max" in str(layout["c"]["reason"])


# --- a draft model of the same checkpoint


class Draft(Model):
    """Takes the layer that the served model ignores; shares its embedding, or has one of its own."""


def drafted(shared: bool) -> tuple[Model, Draft, TensorTable]:
    model = Model({"embed": rows("embed", 0, 6), "w": rows("w", 0, 4)}, embed=(6, 4), w=(4, 6))
    draft = Draft({"embed": rows("embed", 0, 6), "mtp": rows("mtp", 0, 2)}, embed=(6, 4), mtp=(2, 4))
    if shared:
        draft.embed = model.embed
    return model, draft, table_of(("embed", (6, 4)), ("w", (4, 6)), ("mtp", (2, 4)))


@pytest.mark.parametrize("shared", [True, False])
def test_a_draft_model_follows_with_its_target(shared: bool) -> None:
    model, draft, table = drafted(shared)
    weights = checkpoint(table)
    after = nudged(weights, 5)
    for module in (model, draft):
        module.load_weights(weights.items())
    applier = Applier([model, draft], table, torch.device("cpu"))
    start, target = position_of(0, weights, table), position_of(1, after, table)
    assert applier.join([applier.inventory()]).hex == start.digest
    applier.adopt(start)
    applier.stage_patch(patch_between(weights, after, table), target)
    applier.commit(target)
    assert applier.verify()
    for module, names in ((model, ("embed", "w")), (draft, ("embed", "mtp"))):
        for name in names:
            assert torch.equal(getattr(module, name).view(torch.int16), after[name].view(torch.int16)), name


def test_a_run_with_draft_layers_is_refused_without_its_draft_model() -> None:
    model, _, table = drafted(shared=True)
    with pytest.raises(ReplicaRefused, match=r"^mtp: the model's load_weights ignores it"):
        attach(model, table)


def test_a_draft_copy_that_differs_is_refused() -> None:
    model, draft, table = drafted(shared=False)
    draft.embed.data[0] = 0
    applier = Applier([model, draft], table, torch.device("cpu"))
    with pytest.raises(ReplicaRefused, match=r"^embed: rank 0 holds two copies of it that differ"):
        applier.join([applier.inventory()])


# --- do regions share elements?


@given(st.data())
def test_overlap_agrees_with_marking_every_element(data: st.DataObject) -> None:
    """Boxes of one tensor of up to 4 dimensions: row and column slices, stacked experts, and whatever else."""
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    whole = torch.arange(int(np.prod(shape))).reshape(shape)
    regions, seen = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        cut = []
        for size in shape:
            first = data.draw(st.integers(0, size - 1))
            cut.append(slice(first, data.draw(st.integers(first + 1, size))))
        part = whole[tuple(cut)]
        region = block(0, part.shape, part.storage_offset(), part.stride(), part.storage_offset(), part.stride())
        assert region is not None
        regions.append(region)
        seen += part.reshape(-1).tolist()
    assert overlap(regions, "source", whole.numel()) == (len(set(seen)) < len(seen))
    assert overlap(regions, "target", whole.numel()) == (len(set(seen)) < len(seen))


def test_overlap_of_large_column_slices_reads_no_elements() -> None:
    rows, columns = 1 << 20, 1 << 20  # 2^40 elements
    halves = [block(0, (rows, columns // 2), first, (columns, 1), first, (columns, 1)) for first in (0, columns // 2)]
    assert None not in halves
    assert not overlap(halves, "source", rows * columns)  # type: ignore[arg-type]
    assert overlap([*halves, halves[0]], "source", rows * columns)  # type: ignore[list-item]


# --- the algebra of strided blocks


@st.composite
def strided(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of one shape without self-overlap: any permutation and slicing of a tensor of 1 to 4 dimensions."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    views = []
    for _ in range(2):
        order = draw(st.permutations(range(len(sizes))))
        margins = [(draw(st.integers(0, 2)), draw(st.integers(1, 2))) for _ in sizes]
        stored = [first + step * size for (first, step), size in zip(margins, sizes, strict=True)]
        view = torch.arange(int(np.prod(stored))).reshape([stored[axis] for axis in order])
        view = view.permute([list(order).index(axis) for axis in range(len(sizes))])
        views.append(view[tuple(slice(first, None, step) for first, step in margins)])
    return views[0], views[1]


@given(strided(), st.integers(1, 9))
def test_a_block_agrees_with_torch(views: tuple[torch.Tensor, torch.Tensor], limit: int) -> None:
    source, target = views
    pair = dict(zip(source.reshape(-1).tolist(), target.reshape(-1).tolist(), strict=True))
    region = block(0, source.shape, source.storage_offset(), source.stride(), target.storage_offset(), target.stride())
    assert region is not None
    ranks = np.arange(region.numel)
    assert dict(zip(region.indices(ranks).tolist(), region.offsets(ranks).tolist(), strict=True)) == pair
    pieces = list(region.pieces(limit))
    assert all(piece.numel <= limit for piece in pieces)
    assert np.concatenate([p.indices(np.arange(p.numel)) for p in pieces]).tolist() == region.indices(ranks).tolist()
    everything = np.arange(max(pair) + 2)
    positions, offsets = region.locate(everything)
    assert dict(zip(positions.tolist(), offsets.tolist(), strict=True)) == pair
