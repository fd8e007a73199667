"""Stage, commit, verify, undo, poison and heal, on a hand-made model, on the CPU and on a GPU.

Where there is no GPU, a second process runs all of it with Triton's interpreter, where tensors in main memory count as
tensors on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hubsync import kernels
from hubsync.apply import live_weights
from hubsync.apply.applier import Applier
from hubsync.apply.memory import DeviceMemory, Edit
from hubsync.apply.sweep import Sweeper
from hubsync.errors import FormatError, ReplicaPoisoned, ReplicaRefused, WrongParent
from hubsync.format.manifest import Position
from hubsync.format.patch import TensorDelta, TensorValues, changed, compose
from hubsync.kernels.bits import bits_of
from tests.support.on_gpu import DEVICE, INTERPRETED, in_the_interpreter, on_device
from tests.support.toy import TABLE, Model, assert_same, loaded, memory, nudged, patch_between, position_of, view

V0 = view(0)
V1 = nudged(V0, 1)
V2 = nudged(V1, 2)
P0, P1, P2 = (position_of(version, tensors) for version, tensors in enumerate((V0, V1, V2)))


test_in_tritons_interpreter = in_the_interpreter(__file__)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(INTERPRETED, reason="run by the other process")),
        pytest.param("no triton", marks=pytest.mark.skipif(INTERPRETED, reason="run by the other process")),
        pytest.param("gpu", marks=on_device),
    ]
)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Model:
    """On the CPU, on an accelerator without Triton, or on a GPU."""
    if request.param == "no triton":
        monkeypatch.setattr(kernels, "on_gpu", lambda tensor: False)
        monkeypatch.setattr(live_weights, "memory_of", DeviceMemory)
    elif INTERPRETED:
        monkeypatch.setattr(kernels, "on_gpu", lambda tensor: True)
    return loaded(V0, "cpu" if request.param == "cpu" else DEVICE)


@pytest.fixture
def applier(model: Model) -> Applier:
    applier = Applier(model, TABLE, model.embed.device)
    assert applier.join([applier.inventory()]).hex == P0.digest
    applier.adopt(P0)
    return applier


@pytest.mark.parametrize("absolute", [range(len(TABLE)), [0, 5], [1, 2, 3, 4]])
def test_new_values_equal_a_fresh_load_and_are_undone_from_memory(
    model: Model, applier: Applier, absolute: Sequence[int]
) -> None:
    before = memory(model)
    patch = patch_between(V0, V1)
    patch |= {index: TensorValues(bits_of(V1[TABLE[index].name]).copy()) for index in absolute}
    staged = applier.stage_patch(patch, P1)
    assert_same(memory(model), before)
    assert staged.changed == changed(patch_between(V0, V1)), "elements that differ"
    applier.commit(P1)
    assert_same(memory(model), memory(loaded(V1)))
    assert applier.verify()
    assert applier.undo() == P0
    assert_same(memory(model), before)
    assert applier.verify()


def test_new_values_of_another_version_are_not_staged(model: Model, applier: Applier) -> None:
    patch = patch_between(V0, V1) | {0: TensorValues(bits_of(V0[TABLE[0].name]).copy())}
    with pytest.raises(WrongParent, match="does not lead"):
        applier.stage_patch(patch, P1)
    assert applier.staged is None


def test_commit_equals_a_fresh_load(model: Model, applier: Applier) -> None:
    before = memory(model)
    staged = applier.stage_patch(patch_between(V0, V1), P1)
    assert_same(memory(model), before)
    assert (staged.start, staged.target, staged.changed) == (P0, P1, changed(patch_between(V0, V1)))
    assert applier.commit(P1) == staged.changed
    assert_same(memory(model), memory(loaded(V1)))
    assert (applier.position, applier.verified, applier.staged) == (P1, False, None)
    assert applier.verify()
    assert applier.verified


def test_commit_is_idempotent(model: Model, applier: Applier) -> None:
    applier.stage_patch(patch_between(V0, V1), P1)
    applier.commit(P1)
    assert applier.commit(P1) == 0
    assert_same(memory(model), memory(loaded(V1)))


def test_several_deltas_in_one_commit(model: Model, applier: Applier) -> None:
    applier.stage_patch(compose(patch_between(V0, V1), patch_between(V1, V2)), P2)
    applier.commit(P2)
    assert_same(memory(model), memory(loaded(V2)))
    assert applier.verify()


def test_undo_writes_the_old_values_back(model: Model, applier: Applier) -> None:
    before = memory(model)
    applier.stage_patch(patch_between(V0, V1), P1)
    applier.commit(P1)
    assert applier.undo() == P0
    assert_same(memory(model), before)
    assert applier.verify()
    with pytest.raises(ReplicaRefused, match="no commit to undo"):
        applier.undo()


def test_staging_a_whole_view_writes_only_differing_elements(model: Model, applier: Applier) -> None:
    staged = applier.stage_view(V2, P2)
    assert staged.changed == changed(patch_between(V0, V2))
    applier.commit(P2)
    assert_same(memory(model), memory(loaded(V2)))
    assert applier.verify()
    applier.undo()
    assert_same(memory(model), memory(loaded(V0)))


def test_an_empty_delta_moves_the_version(model: Model, applier: Applier) -> None:
    same = Position(1, P0.digest)
    applier.stage_patch({}, same)
    assert applier.commit(same) == 0
    assert applier.position == same
    assert applier.verify()


def test_differing_names_the_tensors(applier: Applier) -> None:
    assert applier.live.differing(V0) == []
    other = {**V0, "k": V1["k"], "mixed": V1["mixed"]}
    assert applier.live.differing(other) == ["k", "mixed"]


# --- refusals: nothing staged, nothing written


def test_a_damaged_delta_is_refused_before_any_write(model: Model, applier: Applier) -> None:
    before = memory(model)
    patch = patch_between(V0, V1)
    patch[1].diffs[0] += 1 if patch[1].diffs[0] != -1 else 2
    with pytest.raises(WrongParent, match="does not lead from"):
        applier.stage_patch(patch, P1)
    with pytest.raises(ReplicaRefused, match="nothing is staged"):
        applier.commit(P1)
    assert_same(memory(model), before)


def test_a_delta_of_another_parent_is_refused(model: Model, applier: Applier) -> None:
    before = memory(model)
    with pytest.raises(WrongParent):
        applier.stage_patch(patch_between(V1, V2), P2)
    assert_same(memory(model), before)


def test_a_malformed_patch_is_refused(applier: Applier) -> None:
    outside = {0: TensorDelta(np.array([37 * 8]), np.array([1], np.int16))}
    with pytest.raises(FormatError, match="embed"):
        applier.stage_patch(outside, P1)


def test_a_view_that_is_not_the_target_is_refused(applier: Applier) -> None:
    with pytest.raises(WrongParent, match="has digest"):
        applier.stage_view(V1, P2)
    with pytest.raises(FormatError, match="q is missing"):
        applier.stage_view({"embed": V1["embed"]}, P1)
    with pytest.raises(FormatError, match=r"scale is torch.float16"):
        applier.stage_view({**V1, "scale": torch.tensor(1.0, dtype=torch.float16)}, P1)
    assert applier.staged is None


def test_a_change_staged_from_another_position_cannot_be_committed(model: Model, applier: Applier) -> None:
    stale = applier.stage_patch(patch_between(V0, V2), P2)
    applier.stage_patch(patch_between(V0, V1), P1)
    applier.commit(P1)
    applier.verify()
    applier.staged = stale
    with pytest.raises(WrongParent, match="was staged from version 0"):
        applier.commit(P2)
    assert_same(memory(model), memory(loaded(V1)))


def test_a_new_target_replaces_the_staged_one(applier: Applier) -> None:
    applier.stage_patch(patch_between(V0, V1), P1)
    applier.stage_patch(patch_between(V0, V2), P2)
    with pytest.raises(ReplicaRefused, match=r"version 2 .* is staged"):
        applier.commit(P1)


def test_the_next_commit_needs_verified_weights(model: Model, applier: Applier) -> None:
    applier.stage_patch(patch_between(V0, V1), P1)
    applier.commit(P1)
    applier.stage_patch(patch_between(V1, V2), P2)
    with pytest.raises(ReplicaRefused, match="still being recomputed"):
        applier.commit(P2)
    assert_same(memory(model), memory(loaded(V1)))
    applier.verify()
    applier.commit(P2)
    assert_same(memory(model), memory(loaded(V2)))


# --- poison


def test_a_commit_poisons_if_another_writer_changed_the_weights(model: Model, applier: Applier) -> None:
    patch = patch_between(V0, V1)
    applier.stage_patch(patch, P1)
    touched = int(patch[1].indices[0])
    model.qkv.view(torch.int16).view(-1)[touched] ^= 1
    before = memory(model)
    with pytest.raises(ReplicaPoisoned, match="something else"):
        applier.commit(P1)
    assert_same(memory(model), before)
    assert applier.poisoned
    for refused in (lambda: applier.commit(P1), applier.undo, applier.verify):
        with pytest.raises(ReplicaPoisoned):
            refused()


def test_a_write_that_does_not_read_back_poisons(applier: Applier) -> None:
    staged = applier.stage_patch(patch_between(V0, V1), P1)
    number, edit = next(iter(staged.edits.items()))
    twice = [torch.cat([part, part]) for part in (edit.places, edit.old, edit.new)]
    twice[2][0] ^= 1  # two patterns for one element: only one of them can be there afterwards
    applier.staged = replace(staged, edits={**staged.edits, number: Edit(*twice)})
    with pytest.raises(ReplicaPoisoned, match="do not hold what was just written"):
        applier.commit(P1)


def test_wrong_weights_poison_and_are_named(model: Model, applier: Applier) -> None:
    model.down.view(torch.int16)[3, 3] ^= 1
    model.qkv.view(torch.int16)[9, 0] ^= 1
    with pytest.raises(ReplicaPoisoned, match=r"are not those of version 0 \(.*\): k, down differ$"):
        applier.verify()
    assert applier.poisoned
    assert not applier.verified


def test_a_moved_parameter_poisons(model: Model, applier: Applier) -> None:
    applier.stage_patch(patch_between(V0, V1), P1)
    model.qkv = nn.Parameter(model.qkv.clone(), requires_grad=False)
    with pytest.raises(ReplicaPoisoned, match="qkv was replaced"):
        applier.commit(P1)


@pytest.mark.parametrize("moved", [False, True])
def test_heal_rebuilds_damaged_and_moved_parameters(model: Model, applier: Applier, moved: bool) -> None:
    with torch.no_grad():
        model.qkv.view(torch.int16).random_()
        model.down.view(torch.int16)[0, 0] ^= 1
    if moved:
        model.mixed = nn.Parameter(model.mixed.clone(), requires_grad=False)
    applier.poison("test")
    with pytest.raises(WrongParent):
        applier.heal(V1, P2)
    assert applier.poisoned
    assert applier.heal(V1, P1) > 0
    assert (applier.position, applier.verified, applier.poisoned) == (P1, True, None)
    assert_same(memory(model), memory(loaded(V1)))
    applier.stage_patch(patch_between(V1, V2), P2)
    applier.commit(P2)
    assert applier.verify()


def test_verify_is_inconclusive_if_a_commit_happens_meanwhile(applier: Applier) -> None:
    applier.stage_patch(patch_between(V0, V1), P1)
    compute = applier._live.digests

    def commits_meanwhile() -> object:
        applier.commit(P1)
        return compute()

    applier._live.digests = commits_meanwhile  # type: ignore[method-assign,assignment]
    assert not applier.verify()
    assert applier.poisoned is None
    assert not applier.verified


# --- looking again, a slice at a time


def sweep_once(sweeper: Sweeper, elements: int) -> int:
    """Number of slices until all weights have been looked at."""
    return next(count for count in itertools.count(1) if sweeper.slice(elements))


@pytest.mark.parametrize("elements", [1, 7, 50, 1 << 20])
def test_a_sweep_finds_a_flipped_bit_and_names_the_tensor(model: Model, applier: Applier, elements: int) -> None:
    sweeper = Sweeper(applier)
    assert (sweep_once(sweeper, elements) == 1) == (elements == 1 << 20)
    sweep_once(sweeper, elements)
    model.mixed.view(torch.int16)[5, 4] ^= 1
    with pytest.raises(ReplicaPoisoned, match=r"are not those of version 0 .*: mixed differs$"):
        sweep_once(sweeper, elements)
    assert applier.poisoned
    assert not sweeper.slice(elements), "poisoned weights are healed first"


def test_every_element_is_looked_at(model: Model, applier: Applier) -> None:
    """One flip in each region, at both ends."""
    for name, index in (("embed", 0), ("embed", 37 * 8 - 1), ("qkv", 64), ("down", 24 * 8 - 1), ("mixed", 29)):
        bits = getattr(model, name).view(torch.int16).view(-1)
        bits[index] ^= 1
        with pytest.raises(ReplicaPoisoned):
            sweep_once(Sweeper(applier), 20)
        bits[index] ^= 1
        applier.heal(V0, P0)


def test_a_sweep_begins_again_after_a_commit(model: Model, applier: Applier) -> None:
    sweeper = Sweeper(applier)
    applier.stage_patch(patch_between(V0, V1), P1)
    assert not sweeper.slice(300)
    applier.commit(P1)
    assert not sweeper.slice(1 << 20), "not verified yet"
    applier.verify()
    assert sweeper.slice(1 << 20)
    applier.undo()
    applier.verify()
    assert sweep_once(sweeper, 100) > 3


def test_a_write_during_a_slice_is_no_deviation(applier: Applier) -> None:
    applier.stage_patch(patch_between(V0, V1), P1)
    sweeper, digest_of = Sweeper(applier), applier._live.digest_of

    def commits_meanwhile(*args: object) -> object:
        applier._live.digest_of = digest_of  # type: ignore[method-assign]
        applier.commit(P1)
        return digest_of(*args)  # type: ignore[arg-type]

    applier._live.digest_of = commits_meanwhile  # type: ignore[method-assign,assignment]
    assert sweeper.slice(1 << 20), "all of them were looked at after it"
    assert (applier.poisoned, applier.position) == (None, P1)


def test_a_sweep_notices_a_parameter_that_was_replaced(model: Model, applier: Applier) -> None:
    model.qkv = nn.Parameter(model.qkv.clone(), requires_grad=False)
    with pytest.raises(ReplicaPoisoned, match="qkv was replaced"):
        sweep_once(Sweeper(applier), 100)
