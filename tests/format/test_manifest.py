"""The documents of a run are a trust boundary: valid ones round-trip, all others are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubsync.errors import FormatError
from hubsync.format.documents import MAX_BYTES, MAX_TABLE_BYTES, seal
from hubsync.format.manifest import Base, Head, Manifest, Part, Position, Run
from hubsync.format.table import TensorSpec, TensorTable

TABLE = TensorTable([TensorSpec("model.embed.weight", (8, 4), "BF16"), TensorSpec("norm.weight", (4,), "F32")])
DIGEST_A, DIGEST_B, SHA = "a" * 32, "b" * 32, "c" * 64

DELTA = Manifest(
    kind="delta",
    run_id="0" * 32,
    table_hash=TABLE.hash,
    epoch="00000001-0badcafe",
    position=Position(2, DIGEST_B),
    parent=Position(1, DIGEST_A),
    parent_epoch="00000001-0badcafe",
    parts=(Part(100, SHA, rank=0), Part(7, SHA, rank=1)),
    changed=12,
    created=1.5,
    step=4,
    name="warm-up",
)
ANCHOR = replace(
    DELTA,
    kind="anchor",
    parent=None,
    parent_epoch=None,
    parts=(Part(9, SHA, file="model.safetensors"), Part(3, SHA, file="config.json")),
    encoding="dense",
)


SAVED = replace(DELTA, serve=1, expires=1.9e9)


@pytest.mark.parametrize("manifest", [DELTA, ANCHOR, SAVED, replace(DELTA, step=None, name=None)])
def test_a_manifest_round_trips(manifest: Manifest) -> None:
    assert Manifest.loads(manifest.dumps()) == manifest
    assert Head.loads(Head(manifest, serve=2).dumps()) == Head(manifest, serve=2)


def test_a_manifest_records_the_version_to_serve() -> None:
    assert (DELTA.served, SAVED.served) == (2, 1)


@pytest.mark.parametrize("change", [{"serve": 3}, {"serve": -1}, {"serve": "2"}, {"expires": -1}, {"expires": "soon"}])
def test_a_version_that_cannot_be_served_or_expire_is_refused(change: dict) -> None:
    with pytest.raises(FormatError):
        Manifest.from_json({**DELTA.to_json(), **change})


def test_a_run_round_trips_with_its_table() -> None:
    run = Run("1" * 32, TABLE, DIGEST_A, Base("org/model", "abc"), created=3.0)
    assert Run.loads(run.dumps()) == run
    assert run.origin == Position(0, DIGEST_A)


def test_unknown_fields_are_ignored_and_unknown_formats_refused() -> None:
    doc = {**DELTA.to_json(), "later": {"field": 1}}
    assert Manifest.from_json(json.loads(json.dumps(doc))) == DELTA
    with pytest.raises(FormatError, match="upgrade hubsync"):
        Manifest.from_json({**doc, "format": "hubsync/3"})
    with pytest.raises(FormatError, match=r"by hubsync 0\.1: start a new run"):
        Manifest.from_json({**doc, "format": "hubsync/1"})


def test_a_run_whose_table_was_edited_is_refused() -> None:
    doc = json.loads(Run("1" * 32, TABLE, DIGEST_A).dumps())
    doc["table"][0][1] = [4, 8]
    with pytest.raises(FormatError, match="does not match its table_hash"):
        Run.loads(seal({key: value for key, value in doc.items() if key != "checksum"}))


def _edit(manifest: Manifest, **changes: object) -> dict:
    return {**json.loads(json.dumps(manifest.to_json())), **changes}


@pytest.mark.parametrize(
    "doc",
    [
        _edit(DELTA, kind="merged"),
        _edit(DELTA, parent=None),
        _edit(ANCHOR, parent={"version": 1, "digest": DIGEST_A}),
        _edit(DELTA, position={"version": 1, "digest": DIGEST_B}),
        _edit(DELTA, position={"version": -1, "digest": DIGEST_B}),
        _edit(DELTA, position={"version": True, "digest": DIGEST_B}),
        _edit(DELTA, position={"version": 2, "digest": "B" * 32}),
        _edit(DELTA, parent_epoch=None),
        _edit(DELTA, parent={"version": 0, "digest": DIGEST_A}),
        _edit(DELTA, epoch="../00000001"),
        _edit(DELTA, epoch="00000001-0badcafe\n"),
        _edit(DELTA, changed=-1),
        _edit(DELTA, changed="12"),
        _edit(DELTA, created=float("inf")),
        _edit(DELTA, created=9e11),
        _edit(DELTA, name="\x1b[31m"),
        _edit(DELTA, parts=[{"size": 1, "sha256": SHA, "rank": 0}, {"size": 1, "sha256": SHA, "rank": 0}]),
        _edit(DELTA, parts=[{"size": 1, "sha256": SHA, "rank": 0, "file": "model.safetensors"}]),
        _edit(DELTA, parts=[{"size": -1, "sha256": SHA, "rank": 0}]),
        _edit(ANCHOR, parts=[{"size": 1, "sha256": SHA, "rank": 0, "file": "../config.json"}]),
        _edit(ANCHOR, parts=[{"size": 1, "sha256": SHA, "rank": 0, "file": "modeling_evil.py"}]),
        _edit(ANCHOR, parts=[{"size": 1, "sha256": SHA, "rank": rank, "file": "config.json"} for rank in (0, 1)]),
        _edit(ANCHOR, parts={"0": {}}),
        [],
        None,
    ],
)
def test_a_manifest_with_an_impossible_field_is_refused(doc: object) -> None:
    with pytest.raises(FormatError) as refusal:
        Manifest.loads(seal(doc) if isinstance(doc, dict) else json.dumps(doc).encode())
    assert "checksum" not in str(refusal.value)


@given(st.data())
def test_a_flipped_bit_is_found_wherever_it_is(data: st.DataObject) -> None:
    for document in (DELTA, Head(DELTA, serve=2), Run("1" * 32, TABLE, DIGEST_A)):
        sealed = bytearray(document.dumps())
        sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        try:  # white space between values carries nothing
            assert type(document).loads(bytes(sealed)) == document
        except FormatError:
            pass


@pytest.mark.parametrize(
    "rows",
    [
        [["a", [1], "BF16"], ["a", [2], "BF16"]],
        [["../a", [1], "BF16"]],
        [["a..b", [1], "BF16"]],
        [["a", [-1], "BF16"]],
        [["a", [1 << 30, 1 << 30], "BF16"]],
        [["a", [0, 1 << 63], "BF16"]],
        [["a", [1] * 9, "BF16"]],
        [["a", [1.0], "BF16"]],
        [["a", [1], "I64"]],
        [["a", [1]]],
        "table",
    ],
)
def test_an_impossible_table_is_refused(rows: object) -> None:
    with pytest.raises(FormatError):
        TensorTable.from_json(rows)


@given(st.binary(max_size=200))
def test_random_bytes_are_never_a_document(data: bytes) -> None:
    for document in (Manifest, Run, Head):
        with pytest.raises(FormatError):
            document.loads(data)  # type: ignore[attr-defined]


def test_deeply_nested_json_is_refused_not_a_crash() -> None:
    with pytest.raises(FormatError):
        Manifest.loads(b"[" * 1_000_000)


def test_a_document_that_is_too_large_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = DELTA.dumps() + b" " * MAX_BYTES
    monkeypatch.setattr("hubsync.format.documents.json.loads", lambda _: pytest.fail("was parsed"))
    for read in (Manifest.loads, Head.loads):
        with pytest.raises(FormatError, match="more than the limit"):
            read(data)
    with pytest.raises(FormatError, match="more than the limit"):
        Run.loads(b" " * (MAX_TABLE_BYTES + 1))


def test_no_writer_commits_a_document_that_readers_refuse() -> None:
    parts = tuple(Part(10, "c" * 64, rank) for rank in range(12_000))
    with pytest.raises(FormatError, match="the document to write"):
        replace(DELTA, parts=parts).dumps()
    largest = replace(DELTA, parts=parts[:7000])
    assert Head.loads(Head(largest, 1).dumps()).manifest == largest
