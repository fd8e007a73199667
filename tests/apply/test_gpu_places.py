"""Deltas decoded and staged on a GPU give what the CPU gives: on a GPU, or else in Triton's interpreter."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hubsync import DeltaWeightTransferEngine, SyncConfig, kernels
from hubsync.apply import served_model
from hubsync.apply.applier import Applier
from hubsync.apply.coordinate_map import build_map
from hubsync.apply.engine import ModelHost, RunSource
from hubsync.apply.gpu_places import read_on_gpu
from hubsync.apply.live_weights import LiveWeights
from hubsync.apply.memory import EditCollector
from hubsync.apply.protocol import BUSY
from hubsync.apply.served_model import ServedModel
from hubsync.apply.session import Session
from hubsync.apply.staging import Sums, add_values
from hubsync.chain import Step
from hubsync.errors import WrongParent
from hubsync.format.codec.device_decode import DeviceDelta
from hubsync.format.digest import digest_change, tensor_seed
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Manifest, Part, Position
from hubsync.format.parts import Transition, write_delta
from hubsync.format.patch import Patch, TensorDelta, TensorValues, changed, compose, invert
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.format.view_bits import ViewBits
from hubsync.kernels.bits import TORCH_DTYPES, bits_of
from tests.support import toy
from tests.support.on_gpu import DEVICE, INTERPRETED, in_the_interpreter, on_device

test_in_tritons_interpreter = in_the_interpreter(__file__)
pytestmark = on_device

RUN = "5" * 32
WIDE = 1100
TABLE = TensorTable(
    [
        TensorSpec("q", (12, 60), "BF16"),
        TensorSpec("rows", (40, 30), "F16"),
        TensorSpec("columns", (5, WIDE), "BF16"),
        TensorSpec("elsewhere", (50,), "BF16"),
        TensorSpec("scale", (7,), "F32"),
        TensorSpec("twice", (9, 20), "BF16"),
    ]
)


class Rank(nn.Module):
    """A part of a model: some rows, some columns, nothing of one tensor, and one tensor in two places."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape, dtype in [
            ("q", (12, 60), torch.bfloat16),
            ("rows", (20, 30), torch.float16),
            ("columns", (5, WIDE // 2), torch.bfloat16),
            ("scale", (7,), torch.float32),
            ("twice", (9, 20), torch.bfloat16),
            ("copy", (9, 20), torch.bfloat16),
        ]:
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == "rows":
                self.rows.data.copy_(tensor[20:])
            elif name == "columns":
                self.columns.data.copy_(tensor[:, WIDE // 2 :])
            elif name != "elsewhere":
                getattr(self, name).data.copy_(tensor)
                if name == "twice":
                    self.copy.data.copy_(tensor)


@pytest.fixture(autouse=True)
def _tensors_count_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(kernels, "on_gpu", lambda tensor: True)


def view_of(table: TensorTable, seed: int) -> toy.Tensors:
    rng = np.random.default_rng(seed)
    return {
        spec.name: torch.from_numpy(rng.integers(0, 256, spec.nbytes, dtype=np.uint8))
        .view(TORCH_DTYPES[spec.dtype])
        .reshape(spec.shape)
        for spec in table
    }


def files_of(
    directory: Path, table: TensorTable, patches: list[Patch], old: toy.Tensors | None = None
) -> tuple[Manifest, list[Path]]:
    """The parts of a delta, compact if there are old weights."""
    parent, position = Position(1, "1" * 32), Position(2, "2" * 32)
    paths = []
    for number, patch in enumerate(patches):
        paths.append(directory / f"part-{number}")
        encoding, bits = (Encoding.FAST, None) if old is None else (Encoding.COMPACT, ViewBits(table, old))
        transition = Transition(RUN, parent, position)
        paths[-1].write_bytes(write_delta(table, patch, transition, encoding=encoding, old=bits))
    parts = tuple(Part(path.stat().st_size, "0" * 64) for path in paths)
    manifest = Manifest(
        kind="delta",
        run_id=RUN,
        table_hash=table.hash,
        epoch="00000001-00000000",
        position=position,
        parent=parent,
        parent_epoch="00000001-00000000",
        parts=parts,
        changed=1,
        created=0.0,
    )
    return manifest, paths


def loaded(model: nn.Module, tensors: toy.Tensors) -> nn.Module:
    model = model.to(DEVICE)
    model.load_weights(tensors.items())  # type: ignore[operator]
    return model


def live_of(model: nn.Module, table: TensorTable) -> LiveWeights:
    seeds = [tensor_seed(spec.name) for spec in table]
    return LiveWeights(build_map([model], table), next(model.parameters()).device, seeds)


def staged(live: LiveWeights, patch: Patch | DeviceDelta) -> tuple[Sums, dict[int, list[tuple[int, int, int]]], set]:
    """Sums from zero on, edits by key in the order of their places, and storages that change."""
    sums, edits = Sums.zero(len(live.parts)), EditCollector(live.memory)
    with live.aside():
        host = patch
        if isinstance(patch, DeviceDelta):
            assert live.places is not None
            live.places.stage(patch, edits, sums)
            host = patch.host
        assert isinstance(host, dict)
        for index, delta in host.items():
            if isinstance(delta, TensorValues):
                add_values(live, index, delta, edits, sums)
                continue
            for part in live.held[index]:
                at, before, after = edits.advance(part.region, delta)
                sums.add(digest_change(live.seeds[index], delta.indices[at], before, after), part)
        found = edits.finish()
    columns = {key: torch.stack([e.places, e.old.long(), e.new.long()], dim=1) for key, e in found.items()}
    return sums, {key: sorted(map(tuple, rows.tolist())) for key, rows in columns.items()}, set(edits.touched)


def assert_staged_alike(live: LiveWeights, delta: DeviceDelta | None, patch: Patch) -> None:
    assert delta is not None
    (sums, edits, touched), (expected, expected_edits, expected_touched) = staged(live, delta), staged(live, patch)
    assert (sums.owned, sums.regions.tolist()) == (expected.owned, expected.regions.tolist())
    assert (edits, touched) == (expected_edits, expected_touched)


def random_patch(table: TensorTable, seed: int, share: float = 0.2) -> Patch:
    old = view_of(table, 0)
    return toy.patch_between(old, nudged(old, seed, share), table)


def nudged(old: toy.Tensors, seed: int, share: float) -> toy.Tensors:
    return toy.nudged(old, seed, share)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.7])
def test_a_rank_stages_what_it_holds(tmp_path: Path, share: float) -> None:
    live = live_of(loaded(Rank(), view_of(TABLE, 0)), TABLE)
    assert live.places is not None
    assert [TABLE[i].name for i in np.flatnonzero(live.places.followed)] == ["q", "rows", "columns", "elsewhere"]
    patch = random_patch(TABLE, 1, share)
    manifest, paths = files_of(tmp_path, TABLE, [patch])
    assert_staged_alike(live, read_on_gpu(live, [Step(manifest)], [paths]), patch)


def test_undone_steps_are_staged(tmp_path: Path) -> None:
    live = live_of(loaded(Rank(), view_of(TABLE, 0)), TABLE)
    patch = random_patch(TABLE, 2, 0.05)
    manifest, paths = files_of(tmp_path, TABLE, [patch])
    assert_staged_alike(live, read_on_gpu(live, [Step(manifest, inverse=True)], [paths]), invert(patch))


def test_new_values_are_staged_with_changes_of_others(tmp_path: Path) -> None:
    live = live_of(loaded(Rank(), view_of(TABLE, 0)), TABLE)
    patch = random_patch(TABLE, 3, 0.05)
    patch[1] = TensorValues(bits_of(view_of(TABLE, 4)["rows"]).copy())
    manifest, paths = files_of(tmp_path, TABLE, [patch])
    assert_staged_alike(live, read_on_gpu(live, [Step(manifest)], [paths]), patch)
    assert read_on_gpu(live, [Step(manifest, inverse=True)], [paths]) is None, "the CPU says that it cannot be undone"


def halves(patch: Patch) -> list[Patch]:
    """Two parts of disjoint elements, as two ranks write them: most tensors are in both."""
    parts: list[Patch] = [{}, {}]
    for index, delta in patch.items():
        assert isinstance(delta, TensorDelta)
        cut = len(delta) // 2
        for part, own in zip(parts, (slice(cut), slice(cut, None)), strict=True):
            if len(delta.indices[own]):
                part[index] = TensorDelta(delta.indices[own], delta.diffs[own])
    return parts


def test_parts_of_several_ranks_are_joined(tmp_path: Path) -> None:
    live = live_of(loaded(Rank(), view_of(TABLE, 0)), TABLE)
    patch = {index: delta for index, delta in random_patch(TABLE, 5, 0.1).items() if index not in (4, 5)}
    manifest, paths = files_of(tmp_path, TABLE, halves(patch))
    assert_staged_alike(live, read_on_gpu(live, [Step(manifest)], [paths]), patch)


def test_paths_of_several_steps_are_composed(tmp_path: Path) -> None:
    """Some elements move twice, and some go back."""
    live = live_of(loaded(Rank(), view_of(TABLE, 0)), TABLE)
    patches = [random_patch(TABLE, seed, 0.1) for seed in (5, 6, 7)]
    patches[2] = {**patches[2], 0: invert(patches[0])[0]}
    found = []
    for number, patch in enumerate(patches):
        (tmp_path / f"{number}").mkdir()
        found.append(files_of(tmp_path / f"{number}", TABLE, halves(patch)))
    steps = [Step(manifest, inverse=number == 1) for number, (manifest, _) in enumerate(found)]
    whole = compose(compose(patches[0], invert(patches[1])), patches[2])
    assert_staged_alike(live, read_on_gpu(live, steps, [paths for _, paths in found]), whole)


def test_parts_that_may_meet_are_left_to_the_cpu(tmp_path: Path) -> None:
    live = live_of(loaded(Rank(), view_of(TABLE, 0)), TABLE)
    patch = {0: random_patch(TABLE, 6, 0.1)[0]}
    manifest, paths = files_of(tmp_path, TABLE, [patch, patch])
    assert_staged_alike(live, read_on_gpu(live, [Step(manifest)], [paths]), compose(patch, patch))
    everything = {0: TensorValues(bits_of(view_of(TABLE, 7)["q"]).copy())}
    manifest, paths = files_of(tmp_path, TABLE, [patch, everything])
    assert read_on_gpu(live, [Step(manifest)], [paths]) is None, "changes, and new values of the same tensor"


def test_what_the_gpu_does_not_read_is_left_to_the_cpu(tmp_path: Path) -> None:
    old = view_of(TABLE, 0)
    live = live_of(loaded(Rank(), old), TABLE)
    patch = random_patch(TABLE, 8)
    manifest, paths = files_of(tmp_path, TABLE, [patch], old)
    assert read_on_gpu(live, [Step(manifest)], [paths]) is None, "compact, and no old weights"
    manifest, paths = files_of(tmp_path, TABLE, [patch])
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    assert read_on_gpu(live, [Step(manifest)], [paths]) is None, "damaged"


@pytest.mark.parametrize("is_compact", [False, True])
def test_a_whole_model_goes_from_version_to_version(tmp_path: Path, is_compact: bool) -> None:
    views = [toy.view(0)]
    views += [toy.nudged(views[0], 1), toy.nudged(views[0], 2)]
    positions = [toy.position_of(number, view) for number, view in enumerate(views)]
    model = toy.loaded(views[0], DEVICE)
    applier = Applier(model, toy.TABLE, model.embed.device)
    applier.join([applier.inventory()])
    applier.adopt(positions[0])
    patch = toy.patch_between(views[0], views[1])
    manifest, paths = files_of(tmp_path, toy.TABLE, [patch], views[0] if is_compact else None)
    delta = read_on_gpu(applier.live, [Step(manifest)], [paths], applier.old_bits())
    assert delta is not None
    assert set(delta.host) == {3, 4, 5, 6}, "what is not a run of 16-bit elements"
    with pytest.raises(WrongParent, match="does not lead"):
        applier.stage_patch(delta, positions[2])
    assert applier.stage_patch(delta, positions[1]).changed == changed(patch)
    applier.commit(positions[1])
    toy.assert_same(toy.memory(model), toy.memory(toy.loaded(views[1])))
    assert applier.verify()
    assert applier.undo() == positions[0]
    toy.assert_same(toy.memory(model), toy.memory(toy.loaded(views[0])))
    assert compose(patch, invert(patch)) == {}


def test_a_session_stages_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a trainer in main memory to a server whose weights are on a GPU."""
    decoded = []

    def read(*arguments: Any) -> DeviceDelta | None:
        decoded.append(read_on_gpu(*arguments))
        return decoded[-1]

    monkeypatch.setattr(served_model, "read_on_gpu", read)
    policy = Linear()
    served = Linear().to(DEVICE, torch.bfloat16)
    served.load_weights(policy.state_dict().items())
    source = RunSource(str(tmp_path / "run"), tmp_path / "cache")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    model = ServedModel(lambda: ModelHost(source, (served,), served.weight.device))
    session = Session(model, verify_share=0.0)  # the interpreter runs in one thread at a time
    policy.weight.grad = (torch.rand(policy.weight.shape) < 0.1).float()  # others hardly move
    with DeltaWeightTransferEngine(policy, optimizer, SyncConfig(bucket=source.bucket)) as engine:
        session.attach()
        settled(session)
        for _ in range(2):
            optimizer.step()
            position = engine.publish().result().position
            session.stage(position)
            settled(session)
            session.commit(position)
            assert torch.equal(served.weight.cpu(), policy.weight.bfloat16())
            settled(session)
    assert [delta is not None and (len(delta.host), len(delta.numbers) > 0) for delta in decoded] == [(0, True)] * 2


class Linear(nn.Module):
    """One matrix."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(40, 30, generator=rng) * 0.02)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in weights:
            self.weight.data.copy_(tensor)


def settled(session: Session) -> None:
    deadline = time.monotonic() + 60
    while session.status()["busy"] or session.state in BUSY or not session.served.verified:
        assert time.monotonic() < deadline, session.status()
        time.sleep(0.01)
