"""The session of a worker that serves a model: a hand-made model, a real chain in a directory, no vLLM."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hubsync.apply.engine import ModelHost, RunSource
from hubsync.apply.live_weights import LiveWeights
from hubsync.apply.served_model import ServedModel
from hubsync.apply.session import Session
from hubsync.apply.verification import Verification
from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader, ChainWriter
from hubsync.errors import HubsyncError, ReplicaPoisoned, ReplicaRefused, WrongParent
from hubsync.format.encoding import Encoding
from hubsync.format.keys import SigningKey
from hubsync.format.manifest import Base, Position, Run
from hubsync.format.parts import Transition, write_anchor, write_delta
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.format.view_bits import ViewBits
from tests.support.sharded import SIZE, Meeting, Shard, random_view
from tests.support.sharded import TABLE as SHARDED
from tests.support.toy import (
    TABLE,
    Model,
    Tensors,
    assert_same,
    loaded,
    memory,
    nudged,
    patch_between,
    position_of,
    view,
)

VIEWS = [view(0)]
for seed in range(1, 4):
    VIEWS.append(nudged(VIEWS[-1], seed))
RUN_ID = "0123456789abcdef" * 2


class Trainer:
    """Publishes `VIEWS` into a directory bucket."""

    def __init__(self, directory: Path):
        self.address = str(directory / "bucket")
        self.positions = [position_of(0, VIEWS[0])]
        run = Run(RUN_ID, TABLE, self.positions[0].digest, created=time.time())
        self.writer = ChainWriter.create(open_bucket(self.address, create=True), run)

    def publish(self, version: int, compact: bool = False) -> Position:
        parent, position = self.writer.position, position_of(version, VIEWS[version])
        patch = patch_between(VIEWS[parent.version], VIEWS[version])
        old = ViewBits(TABLE, VIEWS[parent.version]) if compact else None
        encoding = Encoding.COMPACT if compact else Encoding.FAST
        part = write_delta(TABLE, patch, Transition(RUN_ID, parent, position), encoding=encoding, old=old)
        changed = sum(map(len, patch.values()))
        self.writer.commit_delta([part], digest=position.digest, changed=changed, encoding=encoding)
        self.positions.append(position)
        return position

    def anchor(self, directory: Path) -> None:
        directory.mkdir()
        write_anchor(directory, TABLE, VIEWS[self.writer.position.version])
        self.writer.commit_anchor(directory, at=self.writer.position)


class Replica:
    """A served model and its session."""

    def __init__(self, directory: Path, address: str, tensors: Tensors = VIEWS[0], checkpoint: Path | None = None):
        self.model: Model = loaded(tensors)
        self.host = ModelHost(RunSource(address, directory / "cache"), (self.model,), torch.device("cpu"), checkpoint)
        self.session = Session(ServedModel(lambda: self.host), verify_share=0)  # tests of it say so

    def settled(self) -> dict:
        """The status once the background thread is idle."""
        deadline = time.monotonic() + 30
        while (status := self.session.status())["state"] in ("attaching", "staging", "applied"):
            assert time.monotonic() < deadline, status
            time.sleep(0.005)
        return status

    def attached(self) -> Replica:
        self.session.attach()
        status = self.settled()
        assert status["state"] == "ready", status["error"]
        return self

    def stage(self, position: Position) -> dict:
        self.session.stage(position)
        return self.settled()

    def follow(self, position: Position) -> dict:
        assert self.stage(position)["state"] == "staged"
        self.session.commit(position)
        return self.settled()

    def assert_serves(self, version: int) -> None:
        assert_same(memory(self.model), memory(loaded(VIEWS[version])))


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path)


@pytest.fixture
def replica(tmp_path: Path, trainer: Trainer) -> Replica:
    return Replica(tmp_path, trainer.address).attached()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The base model as a checkpoint directory."""
    directory = tmp_path / "base"
    directory.mkdir()
    save_file(VIEWS[0], directory / "model.safetensors")
    return directory


# --- attach


def test_attach_finds_the_position_of_the_live_weights(replica: Replica, trainer: Trainer) -> None:
    status = replica.session.status()
    assert (status["state"], status["run_id"], status["version"]) == ("ready", RUN_ID, 0)
    assert status["digest"] == trainer.positions[0].digest
    assert (status["staged"], status["window"], status["error"]) == (None, None, None)


def test_a_server_started_from_a_later_version_attaches_there(tmp_path: Path, trainer: Trainer) -> None:
    trainer.publish(1)
    trainer.publish(2)
    replica = Replica(tmp_path, trainer.address, VIEWS[2]).attached()
    assert replica.session.status()["version"] == 2


def test_a_worker_with_a_public_key_refuses_an_unsigned_run(tmp_path: Path, trainer: Trainer) -> None:
    replica = Replica(tmp_path, trainer.address)
    source = replace(replica.host.source, public_key=SigningKey.generate().public)
    replica.host = replace(replica.host, source=source)
    replica.session.attach()
    status = replica.settled()
    assert (status["state"], status["error"]["type"]) == ("refused", "Untrusted")
    assert "run.json is not signed" in status["error"]["message"]


def test_attach_before_the_trainer_has_begun_can_be_retried(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    replica = Replica(tmp_path, str(tmp_path / "bucket"))
    replica.session.attach()
    status = replica.settled()
    assert (status["state"], status["error"]["type"]) == ("refused", "ObjectMissing")
    assert "holds no run" in status["error"]["message"]
    Trainer(tmp_path)
    replica.attached()


def test_weights_of_another_model_are_refused_and_unchanged(tmp_path: Path, trainer: Trainer) -> None:
    other = view(99)
    replica = Replica(tmp_path, trainer.address, other)
    replica.session.attach()
    status = replica.settled()
    assert (status["state"], status["error"]["type"]) == ("refused", "RunMismatch")
    assert "not started from a version of the run" in status["error"]["message"]
    assert_same(memory(replica.model), memory(loaded(other)))


def test_a_relaid_out_weight_is_named(tmp_path: Path, trainer: Trainer, base: Path) -> None:
    replica = Replica(tmp_path, trainer.address, checkpoint=base)
    q = replica.model.qkv.data[:8]
    q.copy_(q.flip(0))  # as a kernel's own layout may do after loading: same shape, other order
    replica.session.attach()
    error = replica.settled()["error"]
    assert error["type"] == "RunMismatch"
    assert error["message"].startswith("q: the live weights are not those of the checkpoint")


class Gated(torch.nn.Module):
    """Serves its gate in float32, as vLLM's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(torch.zeros(4, 8), requires_grad=False)
        self.w = torch.nn.Parameter(torch.zeros(9, 8, dtype=torch.bfloat16), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            getattr(self, name).data.copy_(tensor)


GATED = TensorTable([TensorSpec("gate", (4, 8), "BF16"), TensorSpec("w", (9, 8), "BF16")])


@pytest.mark.parametrize("changed", [None, "gate", "w"])
def test_tensors_that_the_server_loaded_unrounded_are_rounded_at_once(changed: str | None, tmp_path: Path) -> None:
    """The checkpoint keeps the gate in float32, and the run publishes it in bfloat16. Other weights are refused."""
    stored = {"gate": torch.randn(4, 8), "w": torch.randn(9, 8).bfloat16()}
    rounded = {name: tensor.bfloat16() for name, tensor in stored.items()}
    (tmp_path / "base").mkdir()
    save_file(stored, tmp_path / "base" / "model.safetensors")
    start = position_of(0, rounded, GATED)
    run = Run(RUN_ID, GATED, start.digest, base=Base(str(tmp_path / "base")), created=time.time())
    ChainWriter.create(open_bucket(str(tmp_path / "bucket"), create=True), run)
    replica = Replica(tmp_path, str(tmp_path / "bucket"), checkpoint=tmp_path / "base")
    model = Gated()
    model.load_weights(stored.items())
    if changed is not None:
        getattr(model, changed).data[1, 2] += 1
    replica.host = replace(replica.host, models=(model,))
    replica.session.attach()
    status = replica.settled()
    if changed is not None:
        assert (status["state"], status["error"]["type"]) == ("refused", "RunMismatch")
        return
    assert status["state"] == "poisoned"
    replica.session.before_forward()
    status = replica.session.status()
    assert (status["state"], status["version"], status["digest"]) == ("ready", 0, start.digest)
    fresh = Gated()
    fresh.load_weights(rounded.items())
    assert_same(memory(model), memory(fresh))


def test_requests_before_attaching_are_refused_with_the_remedy(tmp_path: Path, trainer: Trainer) -> None:
    session = Replica(tmp_path, trainer.address).session
    assert session.status()["state"] == "detached"
    with pytest.raises(ReplicaRefused, match="detached; call hubsync_attach"):
        session.stage(trainer.positions[0])
    session.before_forward()  # nothing is known to be wrong


# --- stage and commit


def test_follow_version_by_version(replica: Replica, trainer: Trainer) -> None:
    for version in (1, 2, 3):
        position = trainer.publish(version)
        status = replica.stage(position)
        assert status["staged"] == {"version": version, "digest": position.digest}
        replica.assert_serves(version - 1)
        assert replica.session.commit(position) == sum(
            map(len, patch_between(VIEWS[version - 1], VIEWS[version]).values())
        )
        status = replica.settled()
        assert (status["state"], status["version"], status["staged"]) == ("ready", version, None)
        replica.assert_serves(version)


def test_catch_up_with_several_versions_in_one_commit(replica: Replica, trainer: Trainer) -> None:
    for version in (1, 2, 3):
        trainer.publish(version)
    replica.follow(trainer.positions[3])
    replica.assert_serves(3)


def test_a_server_ahead_goes_back_by_undoing_deltas(tmp_path: Path, trainer: Trainer) -> None:
    for version in (1, 2, 3):
        trainer.publish(version)
    replica = Replica(tmp_path, trainer.address, VIEWS[3]).attached()
    replica.follow(trainer.positions[1])
    replica.assert_serves(1)
    replica.follow(trainer.positions[2])
    replica.assert_serves(2)


def test_a_server_ahead_goes_back_through_the_base_if_deltas_cannot_be_undone(
    tmp_path: Path, trainer: Trainer, base: Path
) -> None:
    trainer.publish(1, compact=True)
    trainer.publish(2, compact=True)
    replica = Replica(tmp_path, trainer.address, VIEWS[2], base).attached()
    replica.follow(trainer.positions[1])
    replica.assert_serves(1)


def test_staging_replans_around_a_deleted_delta(tmp_path: Path, trainer: Trainer, base: Path) -> None:
    replica = Replica(tmp_path, trainer.address, VIEWS[0], base).attached()
    trainer.publish(1)
    trainer.publish(2)
    write_anchor(tmp_path, TABLE, VIEWS[2])
    trainer.writer.commit_anchor(tmp_path, at=trainer.positions[2])
    bucket = open_bucket(trainer.address)
    bucket.delete([stat.path for stat in bucket.list() if "/deltas/00000002" in stat.path])
    replica.follow(trainer.positions[2])
    replica.assert_serves(2)


def test_staging_the_served_version_does_nothing(replica: Replica, trainer: Trainer) -> None:
    assert replica.stage(trainer.positions[0])["state"] == "ready"


def test_a_digest_that_the_version_does_not_have_is_refused(replica: Replica, trainer: Trainer) -> None:
    trainer.publish(1)
    status = replica.stage(Position(1, "0" * 32))
    assert (status["state"], status["error"]["type"]) == ("ready", "WrongParent")
    replica.assert_serves(0)


def test_a_damaged_part_is_refused_and_staging_can_be_retried(
    tmp_path: Path, replica: Replica, trainer: Trainer
) -> None:
    position = trainer.publish(1)
    (part,) = (tmp_path / "bucket").rglob("deltas/*.safetensors")
    good = part.read_bytes()
    part.chmod(0o644)
    part.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    status = replica.stage(position)
    assert (status["state"], status["error"]["type"]) == ("ready", "ObjectCorrupt")
    with pytest.raises(ReplicaRefused, match="nothing is staged"):
        replica.session.commit(position)
    replica.assert_serves(0)
    part.write_bytes(good)
    status = replica.follow(position)
    assert status["error"] is None
    replica.assert_serves(1)


def test_a_failed_staging_does_not_leave_an_older_one_to_commit(replica: Replica, trainer: Trainer) -> None:
    first = trainer.publish(1)
    replica.stage(first)
    status = replica.stage(Position(7, "0" * 32))
    assert status["error"]["type"] == "NoPath"
    assert status["staged"] is None


def test_undo_goes_back_one_commit(replica: Replica, trainer: Trainer) -> None:
    replica.follow(trainer.publish(1))
    replica.session.undo()
    assert replica.settled()["version"] == 0
    replica.assert_serves(0)
    replica.follow(trainer.positions[1])
    replica.assert_serves(1)


def test_forward_passes_go_on_while_the_background_attaches_stages_and_verifies(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    position = trainer.publish(1)
    replica = Replica(tmp_path, trainer.address)
    go_on = threading.Event()

    def hold_up(kind: type, name: str) -> None:
        method = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, **kwargs: go_on.wait(60) and method(*args, **kwargs))

    def assert_stuck_in(state: str, version: int) -> None:
        replica.session.before_forward()
        assert replica.session.status()["state"] == state
        replica.assert_serves(version)
        go_on.set()
        replica.settled()
        go_on.clear()

    hold_up(LiveWeights, "digests")
    hold_up(ChainReader, "fetch")
    replica.session.attach()
    assert_stuck_in("attaching", 0)
    replica.session.stage(position)
    assert_stuck_in("staging", 0)
    replica.session.commit(position)
    assert_stuck_in("applied", 1)
    assert replica.session.status()["state"] == "ready"


# --- commit windows


def test_one_window_at_a_time(replica: Replica, trainer: Trainer) -> None:
    position = trainer.publish(1)
    replica.stage(position)
    replica.session.open(position, "mine")
    replica.session.open(position, "mine")
    with pytest.raises(ReplicaRefused, match=r"window to version 1 .* \(token mine\)"):
        replica.session.open(position, "yours")
    with pytest.raises(ReplicaRefused, match="complete that one first"):
        replica.session.open(trainer.positions[0], "mine")
    with pytest.raises(ReplicaRefused, match="another token"):
        replica.session.close("yours")
    assert replica.session.status()["window"]["committed"] is False
    replica.session.commit(position)
    window = replica.session.status()["window"]
    assert (window["version"], window["digest"], window["token"]) == (1, position.digest, "mine")
    assert window["committed"] is True
    replica.session.close("mine")
    replica.session.close("mine")
    assert replica.session.status()["window"] is None


# --- poison


def poisoned_after_commit(replica: Replica, trainer: Trainer) -> None:
    """A bit flips in a weight that the delta does not touch: only the full digest can detect it."""
    position = trainer.publish(1)
    replica.stage(position)
    touched = patch_between(VIEWS[0], VIEWS[1])[TABLE.index_of("down")].indices
    damage_where(replica.model, next(i for i in range(24 * 8) if i not in touched))
    replica.session.commit(position)
    status = replica.settled()
    assert (status["state"], status["error"]["type"]) == ("poisoned", "ReplicaPoisoned")


@pytest.mark.parametrize("source", ["base", "anchor"])
def test_poisoned_weights_are_rebuilt_before_the_next_forward_pass(
    tmp_path: Path, trainer: Trainer, base: Path, source: str
) -> None:
    if source == "anchor":
        trainer.anchor(tmp_path / "anchor")
    replica = Replica(tmp_path, trainer.address, checkpoint=base if source == "base" else None).attached()
    poisoned_after_commit(replica, trainer)
    replica.session.before_forward()
    replica.assert_serves(1)
    status = replica.settled()
    assert (status["state"], status["version"], status["error"]) == ("ready", 1, None)
    assert status["metrics"]["heals"] == 1
    replica.follow(trainer.publish(2))
    replica.assert_serves(2)


def test_no_forward_pass_runs_if_poisoned_weights_cannot_be_rebuilt(replica: Replica, trainer: Trainer) -> None:
    poisoned_after_commit(replica, trainer)
    with pytest.raises(ReplicaPoisoned, match=r"refusing to run the model: .* NoPath"):
        replica.session.before_forward()
    with pytest.raises(ReplicaPoisoned, match="heal first"):
        replica.session.stage(trainer.positions[0])
    assert replica.session.status()["state"] == "poisoned"


def test_weights_damaged_before_a_commit_poison_it(tmp_path: Path, trainer: Trainer, base: Path) -> None:
    replica = Replica(tmp_path, trainer.address, checkpoint=base).attached()
    position = trainer.publish(1)
    replica.stage(position)
    with torch.no_grad():
        replica.model.qkv.view(torch.int16).bitwise_xor_(1)
    with pytest.raises(ReplicaPoisoned, match="something else"):
        replica.session.commit(position)
    assert replica.session.status()["error"]["type"] == "ReplicaPoisoned"
    replica.session.heal()
    replica.assert_serves(0)
    with pytest.raises(ReplicaRefused, match="nothing to heal"):
        replica.session.heal()
    replica.follow(position)
    replica.assert_serves(1)


def damage_where(model: Model, position: int) -> None:
    """Flip a bit of the exponent of one element of `down`, given in checkpoint coordinates."""
    row, column = divmod(position, 8)
    with torch.no_grad():
        model.down.view(torch.int16)[column, row] ^= 1 << 13


@pytest.mark.parametrize("compact", [False, True])
def test_a_sound_delta_that_does_not_fit_damaged_weights_poisons_them(
    tmp_path: Path, trainer: Trainer, base: Path, compact: bool
) -> None:
    """Found by `python -m benchmarks.chaos --only 11`: the delta was blamed, and damaged weights stayed in service."""
    replica = Replica(tmp_path, trainer.address, checkpoint=base).attached()
    position = trainer.publish(1, compact)
    for element in patch_between(VIEWS[0], VIEWS[1])[TABLE.index_of("down")].indices:
        damage_where(replica.model, int(element))
    status = replica.stage(position)
    assert (status["state"], status["error"]["type"]) == ("poisoned", "ReplicaPoisoned")
    replica.session.before_forward()
    replica.assert_serves(0)
    replica.follow(position)
    replica.assert_serves(1)


def test_a_wrong_base_checkpoint_heals_nothing(tmp_path: Path, trainer: Trainer, base: Path) -> None:
    save_file(view(5), base / "model.safetensors")
    replica = Replica(tmp_path, trainer.address)
    replica.host = replace(replica.host, checkpoint=base)
    replica.attached()
    poisoned_after_commit(replica, trainer)
    with pytest.raises(ReplicaPoisoned, match="not the checkpoint this run started from"):
        replica.session.before_forward()


def test_a_checkpoint_that_is_an_anchor_is_not_used_as_the_base(tmp_path: Path, trainer: Trainer) -> None:
    """Its checkpoint is not version 0, although the path from there would be fewer bytes."""
    trainer.publish(1)
    trainer.anchor(tmp_path / "anchor")
    replica = Replica(tmp_path, trainer.address, VIEWS[1], checkpoint=tmp_path / "anchor").attached()
    replica.follow(trainer.publish(2))
    with replica.session.weights_changing("a test"):
        replica.model.qkv.data[0] = 0
    replica.session.before_forward()
    replica.assert_serves(2)


def test_compact_deltas_are_decoded_against_live_weights(tmp_path: Path) -> None:
    """One, then two at once, mixed with a fast one; and after damage from the base checkpoint."""
    trainer = Trainer(tmp_path)
    save_file(VIEWS[0], tmp_path / "model.safetensors")
    replica = Replica(tmp_path, trainer.address, checkpoint=tmp_path).attached()
    replica.follow(trainer.publish(1, compact=True))
    assert_same(memory(replica.model), memory(loaded(VIEWS[1])))
    trainer.publish(2)
    replica.follow(trainer.publish(3, compact=True))
    assert_same(memory(replica.model), memory(loaded(VIEWS[3])))
    with replica.session.weights_changing("a test"):
        replica.model.qkv.data[0] = 0
    replica.session.before_forward()
    assert_same(memory(replica.model), memory(loaded(VIEWS[3])))


# --- verified again


@pytest.fixture
def healable(tmp_path: Path, trainer: Trainer, base: Path) -> Replica:
    """A replica that can rebuild its weights, and never looks at them again by itself."""
    return Replica(tmp_path, trainer.address, checkpoint=base).attached()


def poisoned(replica: Replica) -> str:
    """The error, once the state is poisoned."""
    deadline = time.monotonic() + 30
    while (status := replica.session.status())["state"] != "poisoned":
        assert time.monotonic() < deadline, status
        time.sleep(0.005)
    assert status["error"]["type"] == "ReplicaPoisoned"
    return status["error"]["message"]


def test_a_bit_flipped_long_after_the_commit_is_found_and_named(tmp_path: Path, trainer: Trainer, base: Path) -> None:
    """Nothing is staged, as in a frozen reference. Most of the time, so that the test is short."""
    replica = Replica(tmp_path, trainer.address, checkpoint=base)
    replica.session = Session(ServedModel(lambda: replica.host), verify_share=0.9)
    replica.attached().follow(trainer.publish(1))
    wait_for_passes(replica, replica.session.status()["verification"]["passes"] + 1)
    damage_where(replica.model, 5)
    assert "the live weights are not those of version 1" in poisoned(replica)
    assert poisoned(replica).endswith("down differs")
    replica.session.before_forward()
    replica.assert_serves(1)
    verification = replica.session.status()["verification"]
    assert verification["healed"].endswith("down differs")
    wait_for_passes(replica, verification["passes"] + 1)


def wait_for_passes(replica: Replica, passes: int) -> None:
    deadline = time.monotonic() + 30
    while replica.session.status()["verification"]["passes"] < passes:
        assert time.monotonic() < deadline, replica.session.status()
        time.sleep(0.005)


def test_share_of_the_time() -> None:
    rules = Verification(0.02)
    assert rules.rest(0.001, ended=False) == pytest.approx(0.049)
    assert rules.rest(0.001, ended=True) == 1.0, "a small model is not looked at all the time"
    assert rules.rest(1.0, ended=True) == pytest.approx(49.0)
    assert Verification(1.0).rest(0.001, ended=False) == 0
    assert Verification(0).retry is None


def test_looking_again_yields_to_jobs(tmp_path: Path, trainer: Trainer) -> None:
    replica = Replica(tmp_path, trainer.address)
    replica.session = Session(ServedModel(lambda: replica.host), verify_share=1.0)
    replica.attached()
    for version in (1, 2, 3):
        replica.follow(trainer.publish(version))
    replica.assert_serves(3)


def wait_until_answered(session: Session) -> dict:
    deadline = time.monotonic() + 30
    while (verification := session.status()["verification"])["answered"] < verification["asked"]:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return verification


def test_a_client_can_ask_for_a_verification(healable: Replica, trainer: Trainer) -> None:
    session = healable.session
    before = wait_until_answered(session)
    assert (before["share"], before["asked"], before["healed"]) == (0, 0, None)
    session.verify()
    after = wait_until_answered(session)
    assert (after["passes"], after["answered"]) == (before["passes"] + 1, 1)
    assert 0 <= after["age_s"] < 30
    assert session.status()["state"] == "ready", "a request changes nothing"
    damage_where(healable.model, 7)
    session.verify()
    assert wait_until_answered(session)["passes"] == after["passes"]
    assert poisoned(healable).endswith("down differs")


def test_each_rank_looks_at_its_own_part_alone(ranks: RankPair) -> None:
    """No collective: only one of them has a session that is asked."""
    ranks.all("attach")
    ranks.states()
    ranks.all("join")
    ranks.states()
    with torch.no_grad():
        ranks.models[1].last.view(torch.int16)[0, 0] ^= 1
    for session in ranks.sessions:
        session.verify()
        wait_until_answered(session)
    assert ranks.states() == ["ready", "poisoned"]
    assert "the live weights of rank 1 are not those of version 0" in str(ranks.sessions[1].served.poisoned)


def test_a_worker_without_a_position_has_nothing_to_verify(tmp_path: Path, trainer: Trainer) -> None:
    with pytest.raises(ReplicaRefused, match="detached"):
        Replica(tmp_path, trainer.address).session.verify()


@pytest.mark.parametrize("damaged", [False, True])
def test_no_forward_pass_before_weights_that_the_engine_touched_are_verified(
    healable: Replica, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    monkeypatch.setattr(healable.session._background, "submit", lambda job: None)  # it has no time until then
    with healable.session.weights_changing("the server has reloaded its weights"):
        healable.model.down.data[0, 0] = 1 if damaged else healable.model.down.data[0, 0]
    status = healable.session.status()
    assert (status["state"], status["verification"]["pending"]) == ("applied", "the server has reloaded its weights")
    healable.session.before_forward()
    healable.assert_serves(0)
    status = healable.session.status()
    assert (status["state"], status["verification"]["pending"]) == ("ready", None)
    assert ("heals" in status["metrics"]) == damaged, "right weights are not rebuilt"


def test_nothing_reads_weights_while_the_server_sleeps(healable: Replica, trainer: Trainer) -> None:
    """Jobs wait, also one that was asked for before."""
    session, first, second = healable.session, trainer.publish(1), trainer.publish(2)
    healable.stage(first)
    session.weights_away("the server slept at level 1")
    session.weights_away("the server slept at level 1")
    down = healable.model.down.data.clone()
    healable.model.down.data.zero_()  # stands for memory that is not there
    session.stage(second)
    session.verify()
    with pytest.raises(ReplicaRefused, match="still being recomputed"):
        session.commit(first)
    assert session.status()["state"] == "applied"
    assert session._background.reading.locked()
    healable.model.down.data.copy_(down)
    session.weights_back()
    session.weights_back()
    wait_until_answered(session)
    assert healable.settled()["state"] == "staged"
    session.commit(second)
    healable.settled()
    healable.assert_serves(2)


def test_a_forward_pass_ends_what_was_left_open(healable: Replica) -> None:
    """An update by another backend that never finished."""
    healable.session.weights_away("another backend has updated the weights of this server")
    healable.model.down.data.zero_()
    healable.session.before_forward()
    healable.assert_serves(0)


def test_weights_changed_while_attaching_are_not_taken_for_right(
    tmp_path: Path, trainer: Trainer, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica(tmp_path, trainer.address, checkpoint=base)
    find = ChainReader.find

    def change_meanwhile(reader: ChainReader, digest: str) -> Position | None:
        replica.session.verification.pending = "the server has reloaded its weights"  # `weights_changing` would wait
        replica.model.down.data.zero_()
        return find(reader, digest)

    monkeypatch.setattr(ChainReader, "find", change_meanwhile)
    replica.session.attach()
    assert poisoned(replica).endswith("down differs")
    replica.session.before_forward()
    replica.assert_serves(0)


def test_a_model_that_was_loaded_again_elsewhere_is_mapped_again(tmp_path: Path, trainer: Trainer, base: Path) -> None:
    replica = Replica(tmp_path, trainer.address, checkpoint=base)
    current = [replica.model]
    replica.host = replace(replica.host, serving=lambda: tuple(current))
    replica.attached().follow(trainer.publish(1))
    with replica.session.weights_changing("the server has loaded its model again"):
        replica.model = current[0] = loaded(VIEWS[0])
        replica.host = replace(replica.host, models=tuple(current))
    assert "other modules" in poisoned(replica)
    replica.session.before_forward()
    replica.assert_serves(1)
    replica.follow(trainer.publish(2))
    replica.assert_serves(2)


# --- several ranks


class RankPair:
    """The sessions of an engine of two ranks. Requests reach both, as in vLLM."""

    def __init__(self, directory: Path):
        self.views = [random_view(0)]
        self.views.append(nudged(self.views[0], 1))
        self.positions = [position_of(version, tensors, SHARDED) for version, tensors in enumerate(self.views)]
        self.address = str(directory / "bucket")
        run = Run(RUN_ID, SHARDED, self.positions[0].digest, created=time.time())
        writer = ChainWriter.create(open_bucket(self.address, create=True), run)
        patch = patch_between(self.views[0], self.views[1], SHARDED)
        part = write_delta(SHARDED, patch, Transition(RUN_ID, self.positions[0], self.positions[1]))
        writer.commit_delta([part], digest=self.positions[1].digest, changed=1)
        self.models = self.serving(self.views[0])
        self.hosts = [
            ModelHost(RunSource(self.address, directory / f"cache{rank}"), (model,), torch.device("cpu"))
            for rank, model in enumerate(self.models)
        ]
        self.sessions = [
            Session(ServedModel(lambda rank=rank: self.hosts[rank], seat), verify_share=0)  # type: ignore[misc]
            for rank, seat in enumerate(Meeting().ranks())
        ]

    @staticmethod
    def serving(tensors: Tensors) -> list[Shard]:
        models = [Shard(rank) for rank in range(SIZE)]
        for model in models:
            model.load_weights((name, tensor.clone()) for name, tensor in tensors.items())
        return models

    def all(self, method: str, *args: object) -> list[object]:
        """Every rank's answer; errors are returned."""

        def answer(session: Session) -> object:
            try:
                return getattr(session, method)(*args)
            except HubsyncError as error:
                return error

        with ThreadPoolExecutor(SIZE) as pool:
            return list(pool.map(answer, self.sessions))

    def states(self) -> list[str]:
        """The ranks' states once their background threads are idle."""
        deadline = time.monotonic() + 30
        while any(session.state in ("attaching", "staging", "applied") for session in self.sessions):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return [session.state for session in self.sessions]

    def memory(self) -> list[dict[str, torch.Tensor]]:
        return [memory(model) for model in self.models]


@pytest.fixture
def ranks(tmp_path: Path) -> RankPair:
    return RankPair(tmp_path)


def test_ranks_map_independently_and_join_collectively(ranks: RankPair) -> None:
    ranks.all("attach")
    assert ranks.states() == ["mapped", "mapped"]
    assert ranks.sessions[1].layout()["tensors"]["last"] == {"class": "affine", "elements": 15, "reason": None}
    assert ranks.all("join") == [None, None]
    assert ranks.states() == ["ready", "ready"]
    assert ranks.all("join") == [None, None], "idempotent, and no longer a collective"
    ranks.all("stage", ranks.positions[1])
    assert ranks.states() == ["staged", "staged"]
    assert all(isinstance(changed, int) for changed in ranks.all("commit", ranks.positions[1]))
    assert ranks.states() == ["ready", "ready"]
    for live, fresh in zip(ranks.memory(), map(memory, ranks.serving(ranks.views[1])), strict=True):
        assert_same(live, fresh)


def test_an_error_of_one_rank_fails_the_join_on_all(ranks: RankPair) -> None:
    host = ranks.hosts[1]
    nowhere = str(Path(ranks.address).parent / "nowhere")
    ranks.hosts[1] = replace(host, source=replace(host.source, bucket=nowhere))
    ranks.all("attach")
    assert ranks.states() == ["mapped", "refused"]
    answers = ranks.all("join")
    assert len({str(answer) for answer in answers}) == 1
    assert str(answers[0]).startswith("rank 1: ")
    assert all(isinstance(answer, ReplicaRefused) for answer in ranks.all("commit", ranks.positions[1]))
    ranks.hosts[1] = host
    ranks.all("attach")
    ranks.states()
    ranks.all("join")
    assert ranks.states() == ["ready", "ready"]


def test_a_rank_that_has_not_mapped_its_part_is_named(ranks: RankPair) -> None:
    ranks.sessions[0].attach()
    ranks.states()
    assert [str(answer) for answer in ranks.all("join")] == [
        "rank 1: this worker is detached; call hubsync_attach and wait until it is mapped"
    ] * SIZE


def test_no_rank_commits_if_one_has_not_staged(ranks: RankPair) -> None:
    ranks.all("attach")
    ranks.states()
    ranks.all("join")
    ranks.states()
    ranks.sessions[0].stage(ranks.positions[1])
    assert ranks.states() == ["staged", "ready"]
    before = ranks.memory()
    assert [str(answer).split(": ", 1)[0] for answer in ranks.all("commit", ranks.positions[1])] == ["rank 1"] * SIZE
    for live, old in zip(ranks.memory(), before, strict=True):
        assert_same(live, old)


def test_the_vote_detects_a_rank_with_damaged_weights(ranks: RankPair) -> None:
    """One rank cannot see that its share is wrong. All see that the sum is, and each verifies its own weights."""
    ranks.all("attach")
    ranks.states()
    ranks.all("join")
    ranks.states()
    touched = patch_between(ranks.views[0], ranks.views[1], SHARDED)[SHARDED.index_of("last")].indices
    with torch.no_grad():
        ranks.models[1].last.view(torch.int16).view(-1)[int(touched[0])] ^= 1
    ranks.all("stage", ranks.positions[1])
    ranks.states()
    assert all(isinstance(answer, WrongParent) for answer in ranks.all("commit", ranks.positions[1]))
    assert ranks.states() == ["staged", "poisoned"]
