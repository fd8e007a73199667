"""Numbers of a report, against runs made by hand."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from hubsync.bucket import LocalBucket
from hubsync.bucket.hub import HubBucket
from hubsync.bucket.signed import SignedBucket
from hubsync.chain import ChainReader
from hubsync.errors import ConfigError
from hubsync.format.keys import SigningKey
from hubsync.format.patch import TensorDelta
from hubsync.kernels.bits import bits_of
from hubsync.localhub import LocalHub
from hubsync.replicas.status_objects import Reported
from hubsync.report import density as density_module
from hubsync.report.density import kind_of, layer_of
from hubsync.report.floor import difference_bits, position_bits
from hubsync.report.gather import PUBLISHER, PUSHED, gather
from hubsync.report.records import Event, read_events, read_log
from hubsync.report.timeline import lags
from tests.report.runs import BEGAN, SERVER, events_of, everything, gathered, history, log_of, timed
from tests.support.history import History

# --- density ----------------------------------------------------------------------------------------------


def test_changes_are_counted_by_tensor_and_version(tmp_path: Path) -> None:
    made = history(tmp_path)
    density = gathered(tmp_path, made).density
    views = list(made.views.values())
    assert density.versions == [1, 2, 3, 4, 5, 6]
    for version, (old, new) in zip(density.versions, pairwise(views), strict=True):
        counts = [int((bits_of(old[spec.name]) != bits_of(new[spec.name])).sum()) for spec in made.table]
        if version == 4:  # the bias was published whole: the manifest counts all of it as changed
            counts[1] = 64
        assert density.changed[version - 1].tolist() == counts
    assert density.failed == {}


def test_groups_are_layers_and_kinds() -> None:
    names = ["model.embed_tokens.weight", "model.layers.3.mlp.experts.7.up_proj.weight", "layers.0.norm.weight"]
    assert [layer_of(name) for name in names] == ["model.embed_tokens", "model.layers.3", "layers.0"]
    assert [kind_of(name) for name in names] == ["model.embed_tokens", "mlp.experts.*.up_proj", "norm"]


def test_a_group_has_the_share_of_all_of_its_elements(tmp_path: Path) -> None:
    density = gathered(tmp_path, history(tmp_path, 2)).density
    names, share = density.by(["one", "one"])
    assert names == ["one"]
    assert share.tolist() == [(density.changed.sum(axis=1) / density.table.numel).tolist()]
    names, share = density.by(["b", "a"])
    assert (names, share.shape) == (["b", "a"], (2, 2))


def test_a_part_that_is_gone_or_damaged_is_told(tmp_path: Path) -> None:
    made = history(tmp_path, 4)
    first, second, *_ = sorted((tmp_path / "run").glob("epochs/*/deltas/*"))
    first.unlink()
    second.write_bytes(b"\xff" * second.stat().st_size)
    density = gathered(tmp_path, made).density
    assert density.versions == [3, 4]
    assert sorted(density.failed.values()) == [1, 1]
    assert "a part is gone" in density.failed


def test_of_a_long_run_a_bounded_number_of_versions_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = history(tmp_path, 9)
    monkeypatch.setattr(density_module, "MOST_VERSIONS", 4)
    density = gathered(tmp_path, made).density
    assert (density.versions, density.step) == ([3, 6, 9], 3)


def test_only_the_beginnings_of_parts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 200 kB whose payload begins after 1 kB; what is decoded whole is left out."""
    made = History(LocalBucket(tmp_path / "run", create=True), rows=8192, fraction=0.4)
    part = made.publish().parts[0]
    monkeypatch.setattr(density_module, "_DECODED_BYTES", 0)
    read: list[int] = []
    beginnings = LocalBucket.beginnings

    def counted(bucket: LocalBucket, most: dict[str, int]) -> dict[str, bytes]:
        found = beginnings(bucket, most)
        read.extend(map(len, found.values()))
        return found

    monkeypatch.setattr(LocalBucket, "beginnings", counted)
    density = gathered(tmp_path, made).density
    assert density.versions == [1]
    assert max(read) == 1 << 16 < part.size
    assert density.differences == {}


def test_the_floor_is_that_of_an_ideal_code(tmp_path: Path) -> None:
    """Of 2 of 4 elements, Krichevsky and Trofimov: 3/128 is the probability of each such sequence."""
    assert position_bits(np.array([4, 4]), np.array([2, 0])) == pytest.approx([np.log2(128 / 3), np.log2(128 / 35)])
    assert difference_bits(np.array([1, 1, 1, 1])) == 0
    assert difference_bits(np.array([1, -1, 1, -1])) == pytest.approx(4 + 0.5 * 2)
    made = history(tmp_path, 2)
    run = gathered(tmp_path, made)
    sizes = [8 * delta.nbytes for delta in run.deltas]
    floors = run.density.position_floor * run.density.totals
    for version, floor, size in zip(run.density.versions, floors, sizes, strict=True):
        assert 0 < floor < floor + run.density.differences[version] < size
    patch = made.reader(tmp_path / "other").patch(run.deltas[0])
    diffs = np.concatenate([change.diffs for change in patch.values() if isinstance(change, TensorDelta)])
    assert run.density.differences[1] == difference_bits(diffs.astype(np.int64))


def test_a_run_on_a_hub_is_read_with_few_calls(hub_bucket: HubBucket, local_hub: LocalHub, tmp_path: Path) -> None:
    made = History(hub_bucket)
    for _ in range(4):
        made.publish()
    before = local_hub.api_calls()
    assert gathered(tmp_path, made).density.versions == [1, 2, 3, 4]
    assert local_hub.api_calls() - before <= 14  # 4 of them for the 4 versions that are decoded whole


def test_a_signed_run_is_read_with_its_public_key(tmp_path: Path) -> None:
    """Parts are not signed, and what followers say is not either."""
    key = SigningKey.generate()
    signed = SignedBucket(LocalBucket(tmp_path / "run", create=True), key)
    made = History(signed, public_key=key.public.hex)
    made.publish()
    LocalBucket(tmp_path / "run").commit(
        "replicas/0123456789abcdef.json", Reported("http://a", "host", "ready", 1).dumps()
    )
    reading = SignedBucket(LocalBucket(tmp_path / "run"), key.public)
    run = gather(reading, ChainReader(reading, tmp_path / "cache"), plain=LocalBucket(tmp_path / "run"))
    assert run.density.versions == [1]
    assert [seen.server for seen in run.reported] == ["http://a"]


# --- what is written down ---------------------------------------------------------------------------------


def test_a_log_is_read_in_every_form(tmp_path: Path) -> None:
    state = log_of(tmp_path, 2)
    rows = json.loads(state.read_text())["log_history"]
    lines, listed, demo = tmp_path / "log.jsonl", tmp_path / "list.json", tmp_path / "demo.json"
    lines.write_text("\n".join(map(json.dumps, rows)))
    listed.write_text(json.dumps(rows))
    demo.write_text(json.dumps({"steps": rows, "exact": True}))
    logs = [read_log(path) for path in (state, lines, listed, demo)]
    assert all(log == logs[0] for log in logs)
    assert logs[0].series("reward") == ([1, 2], [0.1, 0.2])
    assert "kl" not in logs[0].metrics  # it is not a number
    assert "name" not in logs[0].metrics


def test_what_is_no_log_and_no_event_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("", "[]", "hello", '{"log_history": []}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no rows of a log"):
            read_log(path)
        with pytest.raises(ConfigError, match="no events"):
            read_events(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_log(tmp_path / "missing")


def test_events_keep_what_they_state(tmp_path: Path) -> None:
    error, undated, commit, verified, *_ = read_events(events_of(tmp_path))
    assert (error.kind, error.version, error.message) == ("error", None, "ObjectMissing: no run <b>yet</b>")
    assert (undated.server, undated.time) == ("follow", None)
    assert commit.seconds == {"stage": 0.04, "commit": 0.002, "pause": 0.004}
    assert (verified.kind, verified.server, verified.seconds) == ("verified", SERVER, {"verify": 0.007})


# --- time -------------------------------------------------------------------------------------------------


def test_phases_are_placed_in_time(tmp_path: Path) -> None:
    run = everything(tmp_path)
    assert run.lanes == [PUBLISHER, PUSHED, SERVER]

    def of(lane: str, version: int) -> dict[str, list[float]]:
        found = [span for span in run.spans if (span.lane, span.version) == (lane, version)]
        return {span.phase: [span.begin - BEGAN, span.end - BEGAN] for span in found}

    def near(ends: list[float]) -> object:
        return pytest.approx(ends, abs=1e-6)

    assert of(PUBLISHER, 2) == {"detect": near([1, 1.1]), "encode": near([1.1, 1.3]), "upload": near([1.3, 1.6])}
    # The trainer's log has durations: behind the upload. The pause is longer than the commit, and includes it.
    assert of(PUSHED, 2) == {"stage": near([1.6, 1.62]), "commit": near([1.62, 1.625])}
    # The follower states when it had committed; workers verify right after that.
    assert of(SERVER, 2) == {
        "stage": near([2.056, 2.096]),
        "commit": near([2.096, 2.1]),
        "verify": near([2.1, 2.107]),
    }


@pytest.mark.parametrize(
    ("servers", "labels"),
    [
        (("http://a.x.com:80", "https://b.x.com"), ["trainer", "a", "b"]),
        (("http://a.x.com", "http://a.y.com"), ["trainer", "a.x.com", "a.y.com"]),
        (("http://10.0.0.1:8000", "http://[::1]:8000"), ["trainer", "10.0.0.1:8000", "[::1]:8000"]),
        ((PUSHED,), ["trainer", PUSHED]),
    ],
)
def test_servers_have_short_names_that_tell_them_apart(
    tmp_path: Path, servers: tuple[str, ...], labels: list[str]
) -> None:
    events = [Event("commit", server, BEGAN, 1, {}) for server in servers]
    assert list(gathered(tmp_path, history(tmp_path, 1), events=events).labels.values()) == labels


def test_lag_is_counted_from_durable_versions(tmp_path: Path) -> None:
    run = everything(tmp_path)
    own = [
        (event.time or 0, event.version or 0)
        for event in run.commits
        if (event.server, event.kind) == (SERVER, "commit")
    ]
    assert [(round(at - BEGAN, 3), lag) for at, lag in lags(run, own)] == [
        (2.1, 0), (2.6, 1), (3.6, 2), (4.6, 0), (5.6, 1),
    ]  # fmt: skip
    assert lags(run, []) == []


def test_versions_that_are_only_saved_are_no_lag(tmp_path: Path) -> None:
    made = history(tmp_path, 2)
    made.publish(serve=False)
    run = timed(gathered(tmp_path, made))
    assert [lag for _, lag in lags(run, [(BEGAN + 1.6, 2)])] == [0, 0]


def test_averages_of_versions_are_not_taken_for_versions(tmp_path: Path) -> None:
    """With logging_steps above 1, TRL logs means."""
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"step": 2, "weight_sync/version": 1.5, "weight_sync/stage_s": 0.1}))
    run = gathered(tmp_path, history(tmp_path, 2), log=read_log(path))
    assert run.commits == []
