"""The wire format stands still: today's code writes the golden files byte for byte, and reads the committed ones.

Should one of these fail, the code has changed what is stored in buckets: see `tests/golden/__init__.py` first.
"""

from __future__ import annotations

import json
from functools import cache, reduce
from pathlib import Path

import pytest
import safetensors
from safetensors.numpy import load_file

from tests.golden import content
from tests.golden.content import KEY, LORA, PARTS, TABLE, GoldenPart, View, advanced
from tests.golden.make import FILES, files_of, make
from tests.golden.names import (
    ChainReader,
    Head,
    LocalBucket,
    Manifest,
    Patch,
    Position,
    PublicKey,
    Run,
    SignedBucket,
    TensorTable,
    ViewBits,
    bits_of,
    changed,
    compose,
    digest_view,
    open_anchor,
    read_delta,
    replay,
)

COMMITTED = files_of(FILES)
NAMES = sorted(COMMITTED)
SIGNED_NAMES = [name for name in NAMES if name.startswith(("run/", "signed/")) and b'"signature"' in COMMITTED[name]]
VERSIONS = pytest.mark.parametrize("version", range(5))
EACH_PART = pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
PUBLIC = PublicKey("03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8")  # of the secret 00 01 02 ... 1f


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Today's files."""
    folder = tmp_path_factory.mktemp("golden")
    make(folder)
    return files_of(folder)


@pytest.fixture
def reader(tmp_path: Path) -> ChainReader:
    return ChainReader(SignedBucket(LocalBucket(FILES / "run"), PUBLIC), tmp_path)


def bits_in(view: View, table: TensorTable) -> dict[str, bytes]:
    """The patterns of a view: NaNs and -0 are compared as they are."""
    assert list(view) == [spec.name for spec in table]
    return {name: bits_of(tensor).tobytes() for name, tensor in view.items()}


@cache
def positions() -> list[Position]:
    """Those of the run's versions."""
    return [Position(number, digest_view(TABLE, view).hex) for number, view in enumerate(content.run_views())]


def between(first: int, last: int) -> Patch:
    """The run's patch from one version to another."""
    return reduce(compose, content.run_patches()[first:last], {})


# --- today's code writes the same ---------------------------------------------------------------------


def test_todays_code_writes_the_same_files(made: dict[str, bytes]) -> None:
    assert sorted(made) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_todays_code_writes_the_same_bytes(made: dict[str, bytes], name: str) -> None:
    assert made.get(name) == COMMITTED[name]


def test_golden_files_are_small() -> None:
    assert sum(map(len, COMMITTED.values())) < 400 << 10


# --- today's code reads delta parts -------------------------------------------------------------------


@EACH_PART
def test_a_part_holds_the_patch_that_it_was_made_from(part: GoldenPart) -> None:
    assert read_delta(FILES / part.path, part.table, part.manifest, part.old) == part.patch


@EACH_PART
def test_a_part_moves_its_parents_digest_to_its_own(part: GoldenPart) -> None:
    with safetensors.safe_open(FILES / part.path, "np") as file:
        metadata = file.metadata()
    view = content.view_of(part.table)
    patch = read_delta(FILES / part.path, part.table, None, part.old)
    for key, version, weights in zip(
        ("from", "to"), part.versions, (view, advanced(part.table, view, patch)), strict=True
    ):
        assert metadata[key] == f"{version}:{digest_view(part.table, weights)}"
    assert metadata["table_hash"] == part.table.hash


@EACH_PART
def test_differences_are_dense_only_where_coded_ones_are_larger(part: GoldenPart) -> None:
    records = load_file(FILES / part.path)["tensors"]
    assert set(records[:, 0].tolist()) == set(part.patch)
    for index, _, _, code in records.tolist():
        dense = part.name.startswith("dense") or part.table[index].shape == ()
        values = isinstance(part.patch[index], content.TensorValues)
        assert code & 0xFF == (2 if values else 0 if dense else 1)


def test_large_tensors_are_cut_into_several_chunks() -> None:
    for level in ("fast", "compact"):
        for index, rows, cols, _ in load_file(FILES / f"parts/chunks-{level}.safetensors")["tensors"].tolist():
            height, width = content.LARGE[index].matrix
            assert -(-height // rows) * -(-width // cols) >= 2


def test_a_merged_delta_does_what_the_deltas_do_one_after_the_other() -> None:
    one_by_one = content.view_of(TABLE)
    for patch in content.in_a_row():
        one_by_one = advanced(TABLE, one_by_one, patch)
    merged = read_delta(FILES / "parts/merged-fast.safetensors", TABLE, None)
    at_once = advanced(TABLE, content.view_of(TABLE), merged)
    assert bits_in(at_once, TABLE) == bits_in(one_by_one, TABLE)


# --- today's code reads documents ---------------------------------------------------------------------


@pytest.mark.parametrize("name", content.DOCUMENTS)
def test_a_document_says_what_it_was_made_from(name: str) -> None:
    document = content.DOCUMENTS[name]
    assert type(document).loads(COMMITTED[f"documents/{name}"]) == document


@pytest.mark.parametrize("name", content.SIGNED_DOCUMENTS)
def test_a_signed_document_says_what_it_was_made_from(name: str) -> None:
    document = content.SIGNED_DOCUMENTS[name]
    assert type(document).loads(COMMITTED[f"signed/{name}"]) == document


@pytest.mark.parametrize("name", ["head.json", "head-of-anchor.json"])
def test_a_head_says_when_it_was_written(name: str) -> None:
    assert Head.loads(COMMITTED[f"documents/{name}"]).written == content.NOW


@pytest.mark.parametrize("name", SIGNED_NAMES)
def test_a_signature_verifies(name: str) -> None:
    folder, _, path = name.partition("/")
    assert SignedBucket(LocalBucket(FILES / folder), PUBLIC).read([path]) == {path: COMMITTED[name]}


def test_all_documents_of_a_signed_run_are_signed() -> None:
    assert KEY.public == PUBLIC
    plain = {"config.json", "model.safetensors.index.json"}
    documents = [name for name in NAMES if name.startswith(("run/", "signed/")) and name.endswith(".json")]
    assert [name for name in documents if name.rpartition("/")[2] not in plain] == SIGNED_NAMES


@pytest.mark.parametrize("folder", ["run", "adapter"])
def test_the_marker_of_an_epoch_says_which_and_when(folder: str) -> None:
    marker = json.loads(COMMITTED[f"{folder}/epochs/{content.EPOCH}/epoch.json"])
    marker.pop("signature", None)
    assert marker == {"format": "hubsync/2", "epoch": content.EPOCH, "created": content.NOW}


# --- today's code reads runs --------------------------------------------------------------------------


def test_the_reader_finds_the_run_as_its_writer_left_it(reader: ChainReader) -> None:
    assert reader.run() == Run.loads(COMMITTED["run/run.json"]) == content.run()
    assert reader.newest() == positions()[4]
    assert reader.served() == positions()[2]
    assert [(manifest.kind, manifest.position) for manifest in reader.manifests()] == [
        ("anchor", positions()[0]),
        *[("delta", position) for position in positions()[1:]],
        ("anchor", positions()[4]),
    ]


@VERSIONS
def test_every_version_of_the_run_is_rebuilt(reader: ChainReader, version: int) -> None:
    view = replay(reader, reader.plan(None, version))
    assert view.position == positions()[version]
    assert bits_in(view.tensors, TABLE) == bits_in(content.run_views()[version], TABLE)


def test_every_delta_of_the_run_holds_the_difference_of_its_ends(reader: ChainReader) -> None:
    manifests = reader.manifests()
    merged = reader.spans(manifests)
    deltas = [manifest for manifest in [*manifests, *merged] if manifest.parent is not None]
    spans = []
    for manifest in deltas:
        first, last = manifest.parent.version, manifest.version
        old = ViewBits(TABLE, content.run_views()[first])
        assert reader.patch(manifest, old) == between(first, last)
        assert (manifest.parent, manifest.position) == (positions()[first], positions()[last])
        assert manifest.changed == changed(between(first, last))
        spans.append((manifest.kind, first, last, manifest.encoding, len(manifest.parts)))
    assert spans == [
        ("delta", 0, 1, "compact", 1),
        ("delta", 1, 2, "fast", 2),
        ("delta", 2, 3, "fast", 1),
        ("delta", 3, 4, "compact", 1),
        ("merged", 0, 2, "fast", 1),
        ("merged", 0, 4, "fast", 1),
        ("merged", 2, 4, "fast", 1),
    ]


def test_manifests_of_the_run_say_what_the_trainer_told(reader: ChainReader) -> None:
    told = [(version, reader.manifest(version)) for version in (1, 2, 3, 4)]
    assert [(version, delta.step, delta.name, delta.serve, delta.expires) for version, delta in told] == [
        (1, 10, "Größe 1/4", None, None),
        (2, None, None, None, None),
        (3, None, None, 2, content.NOW + 3600),
        (4, 40, "last", None, None),
    ]


@pytest.mark.parametrize(("version", "files"), [(0, 1), (4, 3)])
def test_an_anchor_opens_to_equal_tensors(version: int, files: int) -> None:
    folder = FILES / f"run/epochs/{content.EPOCH}/anchors/{version:08d}"
    manifest = Manifest.loads((folder / "manifest.json").read_bytes())
    assert manifest.position == positions()[version]
    paths = [folder / str(part.file) for part in manifest.parts]
    assert sum(path.suffix == ".safetensors" for path in paths) == files
    assert {path.name for path in paths} == {path.name for path in folder.iterdir()} - {"manifest.json"}
    opened = open_anchor(paths, TABLE)
    assert bits_in(opened, TABLE) == bits_in(content.run_views()[version], TABLE)
    assert (folder / "config.json").read_text() == content.CONFIG


def test_the_run_of_an_adapter_is_rebuilt(tmp_path: Path) -> None:
    reader = ChainReader(LocalBucket(FILES / "adapter"), tmp_path)
    assert reader.run() == content.adapter_run()
    views = [content.view_of(LORA), advanced(LORA, content.view_of(LORA), content.adapter_patch())]
    for version, view in enumerate(views):
        rebuilt = replay(reader, reader.plan(None, version))
        assert rebuilt.position == Position(version, digest_view(LORA, view).hex)
        assert bits_in(rebuilt.tensors, LORA) == bits_in(view, LORA)
    config = FILES / f"adapter/epochs/{content.EPOCH}/anchors/00000000/adapter_config.json"
    assert json.loads(config.read_text()) == content.ADAPTER.config
