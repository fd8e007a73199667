"""Several ranks of one engine: ownership of elements, and writes of all ranks or none. Ranks are threads here."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from hubsync.apply.applier import Applier
from hubsync.apply.protocol import error_from_json
from hubsync.apply.vote import PrepareVote, decide
from hubsync.errors import HubsyncError, ReplicaPoisoned, ReplicaRefused, WrongParent
from hubsync.format.digest import digest_view
from hubsync.format.manifest import Position
from hubsync.format.patch import TensorDelta
from tests.support.sharded import SIZE, TABLE, Meeting, Shard, random_view
from tests.support.toy import Tensors, assert_same, memory, nudged, patch_between


class Engine:
    """All ranks of one engine; requests reach all of them."""

    def __init__(self, tensors: Tensors):
        self.models = [Shard(rank) for rank in range(SIZE)]
        for model in self.models:
            model.load_weights((name, tensor.clone()) for name, tensor in tensors.items())
        self.appliers = [
            Applier(model, TABLE, torch.device("cpu"), group=seat)
            for model, seat in zip(self.models, Meeting().ranks(), strict=True)
        ]

    def all(self, request: Callable[[Applier], Any]) -> list[Any]:
        """Every rank's answer; errors are returned."""

        def answer(applier: Applier) -> Any:
            try:
                return request(applier)
            except HubsyncError as error:
                return error

        with ThreadPoolExecutor(SIZE) as pool:
            return list(pool.map(answer, self.appliers))

    def join(self) -> list[Any]:
        inventories = [applier.inventory() for applier in self.appliers]
        return self.all(lambda applier: applier.join(inventories))

    def memory(self) -> dict[str, torch.Tensor]:
        return {f"{rank}.{key}": bits for rank, model in enumerate(self.models) for key, bits in memory(model).items()}


V0 = random_view(0)
V1 = nudged(V0, 1)
V2 = nudged(V1, 2)
P0, P1, P2 = (Position(number, digest_view(TABLE, tensors).hex) for number, tensors in enumerate((V0, V1, V2)))


@pytest.fixture
def engine() -> Engine:
    engine = Engine(V0)
    assert [digest.hex for digest in engine.join()] == [P0.digest] * SIZE
    for applier in engine.appliers:
        applier.adopt(P0)
    return engine


def stage(engine: Engine, old: Tensors, new: Tensors, target: Position) -> None:
    for applier in engine.appliers:
        applier.stage_patch(patch_between(old, new, TABLE), target)


def test_every_rank_commits_its_part(engine: Engine) -> None:
    for old, new, target in ((V0, V1, P1), (V1, V2, P2)):
        stage(engine, old, new, target)
        assert all(isinstance(changed, int) for changed in engine.all(lambda applier: applier.commit(target)))  # noqa: B023
        assert_same(engine.memory(), Engine(new).memory())
        assert all(applier.verify() for applier in engine.appliers)
    assert engine.all(lambda applier: applier.commit(P2)) == [0] * SIZE, "idempotent"
    assert engine.all(Applier.undo) == [P1] * SIZE
    assert_same(engine.memory(), Engine(V1).memory())
    assert all(applier.verify() for applier in engine.appliers)


def test_an_anchor_is_staged_on_every_rank(engine: Engine) -> None:
    for applier in engine.appliers:
        applier.stage_view(V2, P2)
    engine.all(lambda applier: applier.commit(P2))
    assert_same(engine.memory(), Engine(V2).memory())
    assert all(applier.verify() for applier in engine.appliers)


def not_staged(engine: Engine) -> None:
    engine.appliers[1].discard()


def poisoned(engine: Engine) -> None:
    engine.appliers[1].poison("for a test")


def moved(engine: Engine) -> None:
    engine.models[1].norm = nn.Parameter(engine.models[1].norm.clone(), requires_grad=False)


def changed_by_another_writer(engine: Engine) -> None:
    engine.models[1].last.data.view(torch.int16)[0] ^= 1


def unverified(engine: Engine) -> None:
    engine.appliers[1].verified = False


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (not_staged, ReplicaRefused),
        (poisoned, ReplicaPoisoned),
        (moved, ReplicaPoisoned),
        (changed_by_another_writer, ReplicaPoisoned),
        (unverified, ReplicaRefused),
    ],
)
def test_no_rank_writes_if_one_cannot(
    engine: Engine, spoil: Callable[[Engine], None], error: type[HubsyncError]
) -> None:
    stage(engine, V0, V1, P1)
    spoil(engine)
    before = engine.memory()
    answers = engine.all(lambda applier: applier.commit(P1))
    assert [type(answer) for answer in answers] == [error] * SIZE, "the same answer from all"
    assert all(str(answer).startswith("rank 1: ") for answer in answers)
    assert_same(engine.memory(), before)
    assert [applier.position for applier in engine.appliers] == [P0] * SIZE
    assert engine.appliers[0].staged is not None, "the others may try again"


def test_all_ranks_undo_or_none_does(engine: Engine) -> None:
    stage(engine, V0, V1, P1)
    engine.all(lambda applier: applier.commit(P1))
    engine.appliers[0]._undo = None
    answers = engine.all(Applier.undo)
    assert [str(answer) for answer in answers] == ["rank 0: there is no commit to undo"] * SIZE
    assert_same(engine.memory(), Engine(V1).memory())


def test_the_vote_detects_a_wrong_delta(engine: Engine) -> None:
    """No rank can detect it alone: the wrong difference is in another rank's part."""
    patch = patch_between(V0, V1, TABLE)
    last = TABLE.index_of("last")
    patch[last] = TensorDelta(patch[last].indices, patch[last].diffs + 1)
    for applier in engine.appliers:
        applier.stage_patch(patch, P1)
    answers = engine.all(lambda applier: applier.commit(P1))
    assert [type(answer) for answer in answers] == [WrongParent] * SIZE
    assert_same(engine.memory(), Engine(V0).memory())


def test_a_write_that_fails_after_the_vote_poisons_and_heals_forward(engine: Engine) -> None:
    stage(engine, V0, V1, P1)

    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    engine.appliers[1]._write = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError), ThreadPoolExecutor(SIZE) as pool:
        list(pool.map(lambda applier: applier.commit(P1), engine.appliers))
    del engine.appliers[1]._write  # type: ignore[attr-defined]
    assert [applier.position for applier in engine.appliers] == [P1] * SIZE, "the others have written"
    with pytest.raises(ReplicaPoisoned):
        engine.appliers[1].verify()
    engine.appliers[1].heal(V1, P1)
    assert_same(engine.memory(), Engine(V1).memory())


def test_a_commit_that_some_ranks_made_is_completed_by_the_others(engine: Engine) -> None:
    stage(engine, V0, V1, P1)
    engine.appliers[0]._arrive(P1, engine.appliers[0].staged.sums)  # type: ignore[union-attr]
    engine.models[0].load_weights((name, tensor.clone()) for name, tensor in V1.items())
    assert engine.all(lambda applier: applier.commit(P1))[0] == 0
    assert_same(engine.memory(), Engine(V1).memory())


def test_a_rank_detects_its_own_damage(engine: Engine) -> None:
    engine.models[1].norm.data.view(torch.int16)[3] ^= 1  # a copy: rank 0 owns it
    assert engine.appliers[0].verify()
    with pytest.raises(
        ReplicaPoisoned, match=r"the live weights of rank 1 are not those of version 0 .*: norm differs$"
    ):
        engine.appliers[1].verify()


def test_copies_that_differ_are_refused() -> None:
    engine = Engine(V0)
    engine.models[1].qkv.data[5].view(torch.int16)[0] ^= 1
    assert [str(answer) for answer in engine.join()] == ["kv: ranks 0 and 1 hold copies of it that differ"] * SIZE


def test_elements_that_no_rank_holds_are_refused() -> None:
    engine = Engine(V0)
    inventories = [engine.appliers[0].inventory(), []]
    with pytest.raises(ReplicaRefused, match=r"^embed: the model's load_weights uses only 192 of 296 elements"):
        engine.appliers[0].join(inventories)
    with pytest.raises(ReplicaRefused, match=r"^embed: the model's load_weights ignores it"):
        engine.appliers[0].join([[], []])


def test_all_ranks_raise_the_first_refusal() -> None:
    share = digest_view(TABLE, V1)
    with pytest.raises(ReplicaRefused, match=r"^rank 1: no$"):
        decide([PrepareVote(None, P0, P1, share), PrepareVote({"type": "NoSuchClass", "message": "no"}, P0, P1, share)])
    assert type(error_from_json({"type": "Exception", "message": "x"})) is ReplicaRefused


def test_an_unexpected_error_on_one_rank_is_a_refusal_on_all(engine: Engine) -> None:
    """An exception before the collective would leave the other ranks waiting."""
    stage(engine, V0, V1, P1)

    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    engine.appliers[1]._check_memory = fail  # type: ignore[method-assign]
    answers = engine.all(lambda applier: applier.commit(P1))
    assert [str(answer) for answer in answers] == ["rank 1: RuntimeError: the device is gone"] * SIZE
    assert_same(engine.memory(), Engine(V0).memory())


def test_ranks_must_share_start_and_target() -> None:
    share = digest_view(TABLE, V1)
    nothing = share - share
    with pytest.raises(WrongParent, match="different positions"):
        decide([PrepareVote(None, P0, P1, share), PrepareVote(None, P2, P1, nothing)])
    with pytest.raises(WrongParent, match="rank 1 to"):
        decide([PrepareVote(None, P0, P1, share), PrepareVote(None, P0, P2, nothing)])
    decide([PrepareVote(None, P0, P1, share), PrepareVote(None, P1, P1, nothing)])
