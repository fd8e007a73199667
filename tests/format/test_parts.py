"""Parts: they round-trip, belong to one place in one chain, and hostile ones are refused."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from hubsync.errors import ConfigError, FormatError
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Manifest, Part, Position
from hubsync.format.parts import (
    Transition,
    _laid_out,
    _parse,
    open_anchor,
    read_delta,
    write_anchor,
    write_anchor_file,
    write_delta,
)
from hubsync.format.patch import TensorDelta, TensorValues, check
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.format.view_bits import ViewBits
from hubsync.kernels.bits import SIGNED, TORCH_DTYPES, bits_of

compiling = settings(deadline=None)  # the first example of a test may compile a kernel

TABLE = TensorTable(
    [
        TensorSpec("embed.weight", (40, 16), "BF16"),
        TensorSpec("layer.weight", (3, 8, 8), "F32"),
        TensorSpec("layer.scale", (), "F16"),
        TensorSpec("layer.empty", (0, 4), "BF16"),
        TensorSpec("expert.weight", (30, 20), "F8_E4M3"),
    ]
)
RUN = "5" * 32
PARENT, POSITION = Position(6, "a" * 32), Position(7, "b" * 32)


def patch_of(rng):
    patch = {}
    for index, spec in enumerate(TABLE):
        indices = np.flatnonzero(rng.random(spec.numel) < rng.choice([0, 0.05, 1]))
        if len(indices):
            large = rng.random() < 0.3
            diffs = rng.choice([-1, 1], len(indices)) * (rng.integers(1, 100, len(indices)) if large else 1)
            patch[index] = TensorDelta(indices, diffs.astype(SIGNED[spec.width]))
    return patch


patches = st.builds(lambda seed: patch_of(np.random.default_rng(seed)), st.integers(0, 1 << 32))


def written(patch, old=None):
    encoding = Encoding.FAST if old is None else Encoding.COMPACT
    return bytes(write_delta(TABLE, patch, Transition(RUN, PARENT, POSITION), encoding=encoding, old=old))


def manifest_of(**changes):
    manifest = Manifest(
        kind="delta",
        run_id=RUN,
        table_hash=TABLE.hash,
        epoch="00000001-00000000",
        position=POSITION,
        parent=PARENT,
        parent_epoch="00000001-00000000",
        parts=(Part(1, "0" * 64),),
        changed=1,
        created=0.0,
    )
    return replace(manifest, **changes)


SOME = {
    0: TensorDelta(np.array([1, 17, 600]), np.array([1, -1, 300], np.int16)),
    4: TensorDelta(np.array([5]), np.array([-128], np.int8)),
}


def rebuilt(**changes):
    """The part of `SOME` with some of its tensors or metadata replaced (None removes)."""
    data = written(SOME)
    tensors = safetensors.numpy.load(data)
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    both = {**tensors, **metadata, **changes}
    tensors = {k: v for k, v in both.items() if isinstance(v, np.ndarray)}
    return safetensors.numpy.save(tensors, {k: v for k, v in both.items() if isinstance(v, str)})


# --- delta parts --------------------------------------------------------------------------------------


@compiling
@given(patches, st.booleans(), st.integers(0, 99))
def test_a_patch_round_trips_and_the_same_patch_gives_the_same_bytes(patch, compact, seed):
    old = ViewBits(TABLE, view_of(TABLE, seed)) if compact else None
    data = written(patch, old)
    assert read_delta(data, TABLE, manifest_of(), old) == patch
    assert written(patch, old) == data


def test_a_part_is_a_small_safetensors_file_with_metadata(tmp_path):
    path = tmp_path / "part.safetensors"
    path.write_bytes(written(SOME))
    with safe_open(path, "np") as file:
        assert set(file.keys()) == {"tensors", "books", "chunks", "payload"}
        assert file.metadata() == {
            "format": "hubsync-delta/2",
            "encoding": "fast",
            "run_id": RUN,
            "table_hash": TABLE.hash,
            "from": f"6:{'a' * 32}",
            "to": f"7:{'b' * 32}",
            "rank": "0",
        }
    assert read_delta(path, TABLE, None) == SOME
    assert len(written({})) < 700


@pytest.mark.parametrize("compact", [False, True])
def test_new_values_of_tensors_round_trip_with_changes_of_others(compact):
    old = ViewBits(TABLE, view_of(TABLE)) if compact else None
    values = {
        index: TensorValues(bits_of(view_of(TABLE, 5)[spec.name]).copy())
        for index, spec in enumerate(TABLE)
        if index not in SOME and spec.numel
    }
    assert read_delta(written({**SOME, **values}, old), TABLE, manifest_of(), old) == {**SOME, **values}
    assert read_delta(written(values, old), TABLE, manifest_of(), old) == values
    size = sum(TABLE[index].nbytes for index in values)
    assert size < len(written(values, old)) < size + 1000


def test_a_part_of_format_1_is_refused_with_the_remedy():
    with pytest.raises(FormatError, match=r"by hubsync 0\.1: start a new run"):
        read_delta(rebuilt(format="hubsync-delta/1"), TABLE, None)


def test_a_compact_part_is_marked_and_needs_the_old_weights():
    old = ViewBits(TABLE, view_of(TABLE))
    data = written(SOME, old)
    assert b'"encoding":"compact"' in data[:600]
    with pytest.raises(ConfigError, match="decodable only with the weights that it applies to"):
        read_delta(data, TABLE, None)
    assert read_delta(data, TABLE, None, old) == SOME


def test_an_unsound_patch_is_not_written():
    with pytest.raises(FormatError, match="patch:"):
        written({0: TensorDelta(np.array([640]), np.array([1], np.int16))})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"run_id": "6" * 32}, "run_id"),
        ({"parent": Position(5, "a" * 32)}, "from"),
        ({"parent": Position(6, "c" * 32)}, "from"),
        ({"position": Position(8, "b" * 32)}, "to"),
        ({"position": Position(7, "c" * 32)}, "to"),
    ],
)
def test_a_part_of_another_place_in_the_chain_is_refused(changes, key):
    with pytest.raises(FormatError, match=f"{key} is"):
        read_delta(written(SOME), TABLE, manifest_of(**changes))


def test_a_part_of_another_model_is_refused():
    other = TensorTable([*TABLE, TensorSpec("more", (1,), "BF16")])
    with pytest.raises(FormatError, match="table_hash"):
        read_delta(written(SOME), other, None)


def test_a_part_is_not_accepted_as_an_anchor():
    with pytest.raises(FormatError, match="not one of a delta"):
        read_delta(written(SOME), TABLE, manifest_of(kind="anchor", parent=None, parent_epoch=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"format": "hubsync-delta/3"}, "upgrade hubsync", id="newer format"),
        pytest.param({"encoding": "denser"}, "upgrade hubsync", id="newer encoding"),
        pytest.param({"books": np.zeros((1, 11), np.uint8)}, "code books have 12 bytes", id="books of another level"),
        pytest.param({"books": np.zeros((0, 12), np.uint8)}, "code book 0 of 0", id="no books"),
        pytest.param({"format": None}, "upgrade hubsync", id="no format"),
        pytest.param({"chunks": None}, "instead of", id="missing tensor"),
        pytest.param({"extra": np.zeros(1, np.uint8)}, "instead of", id="unknown tensor"),
        pytest.param({"payload": np.zeros(4, np.uint32)}, r"payload is U32\[4\]", id="dtype"),
        pytest.param({"tensors": np.zeros((1, 5), np.uint32)}, "4 columns, not 5", id="columns"),
        pytest.param({"tensors": np.zeros(4, np.uint32)}, r"tensors is U32\[4\]", id="dimensions"),
        pytest.param(
            {"payload": np.zeros(0, np.uint8)}, r"embed\.weight, chunk 0: its payload is missing", id="no payload"
        ),
        pytest.param({"chunks": np.zeros(0, np.uint8)}, "1 chunk rows are needed, 0 bits are left", id="no chunk rows"),
        pytest.param({"tensors": np.zeros((0, 4), np.uint32)}, "left over", id="no records"),
        pytest.param({"tensors": np.full((2, 4), 5, np.uint32)}, "not in the table", id="no such tensor"),
        pytest.param({"tensors": np.array([[3, 1, 1, 1]], np.uint32)}, "do not fit", id="empty tensor"),
    ],
)
def test_errors_name_the_defect_of_a_part(changes, message):
    with pytest.raises(FormatError, match=message):
        read_delta(rebuilt(**changes), TABLE, None)


def test_a_tensor_listed_twice_is_refused():
    tensors = {k: np.concatenate([v, v]) for k, v in safetensors.numpy.load(written(SOME)).items()}
    with pytest.raises(FormatError, match="listed twice"):
        read_delta(rebuilt(**tensors), TABLE, None)


def test_a_giant_grid_is_refused_before_memory_is_allocated():
    table = TensorTable([TensorSpec("w", (1 << 20, 1 << 20), "BF16")])
    tensors = safetensors.numpy.load(written(SOME))
    tensors["tensors"] = np.array([[0, 1, 1, 1]], np.uint32)
    header = {"format": "hubsync-delta/2", "encoding": "fast", "table_hash": table.hash}
    data = safetensors.numpy.save(tensors, header)
    tracemalloc.start()
    with pytest.raises(FormatError, match="are needed"):
        read_delta(data, table, None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20


@settings(compiling, max_examples=300)
@given(patches, st.booleans(), st.data())
def test_a_damaged_part_is_refused_or_gives_a_sound_patch(patch, compact, data):
    old = ViewBits(TABLE, view_of(TABLE)) if compact else None
    part = bytearray(written(patch, old))
    for _ in range(data.draw(st.integers(1, 3))):
        part[data.draw(st.integers(0, len(part) - 1))] = data.draw(st.integers(0, 255))
    part = bytes(part[: data.draw(st.sampled_from([len(part), data.draw(st.integers(0, len(part)))]))])
    try:
        check(TABLE, read_delta(part, TABLE, None, ViewBits(TABLE, view_of(TABLE))))
    except FormatError:
        pass


@settings(compiling, max_examples=500)
@given(patches, st.data())
def test_the_short_way_into_a_part_accepts_nothing_that_safetensors_refuses(tmp_path_factory, patch, data):
    part = bytearray(written(patch))
    header = 8 + int.from_bytes(part[:8], "little")
    for _ in range(data.draw(st.integers(0, 3))):
        part[data.draw(st.integers(0, header - 1))] = data.draw(st.sampled_from([*b'0123456789[]{},: -.eNt"\0\xff']))
    path = tmp_path_factory.mktemp("parts") / "part"
    path.write_bytes(part[: data.draw(st.sampled_from([len(part), data.draw(st.integers(0, len(part)))]))])
    found = _laid_out(path)
    if found is not None:
        arrays, metadata = _parse(path.read_bytes())
        assert found[1] == metadata
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[0][name], array)


def test_the_short_way_reads_what_is_written(tmp_path):
    path = tmp_path / "part"
    path.write_bytes(written(SOME))
    assert _laid_out(path) is not None


@pytest.mark.parametrize(
    ("key", "value"),
    [("data_offsets", [0]), ("data_offsets", {}), ("data_offsets", [0, 1 << 80]), ("shape", [1 << 80]), ("shape", "x")],
)
def test_the_short_way_leaves_an_odd_header_to_safetensors(key, value, tmp_path):
    part, path = written(SOME), tmp_path / "part"
    begin = 8 + int.from_bytes(part[:8], "little")
    header = json.loads(part[8:begin])
    header["tensors"][key] = value
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + part[begin:])
    assert _laid_out(path) is None


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\xff" * 100, b"\x02" + bytes(7) + b"{}", b"[" * 100])
def test_a_file_that_is_not_safetensors_is_refused(data):
    with pytest.raises(FormatError, match="delta part"):
        read_delta(data, TABLE, None)


# --- anchors ------------------------------------------------------------------------------------------


def view_of(table, seed=0):
    """Random bit patterns, NaN payloads and -0 among them."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for spec in table:
        tensor = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
        bits_of(tensor)[:] = rng.integers(0, 1 << spec.width, spec.numel)
        tensors[spec.name] = tensor
    return tensors


def assert_same(read, tensors):
    assert list(read) == [spec.name for spec in TABLE]
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert np.array_equal(bits_of(read[name]), bits_of(tensor.contiguous()))


def test_an_anchor_is_one_ordinary_checkpoint_file(tmp_path):
    tensors = view_of(TABLE)
    paths = write_anchor(tmp_path, TABLE, tensors)
    assert [path.name for path in paths] == ["model.safetensors"]
    with safe_open(paths[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert_same(open_anchor(paths, TABLE), tensors)


def test_a_large_anchor_has_shards_and_an_index(tmp_path):
    tensors = view_of(TABLE)
    paths = write_anchor(tmp_path, TABLE, tensors, max_shard_bytes=1400)
    shards = [path for path in paths if path.suffix == ".safetensors"]
    assert [path.name for path in shards] == [f"model-0000{i}-of-0000{len(shards)}.safetensors" for i in (1, 2)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": TABLE.nbytes}
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
    assert_same(open_anchor(paths, TABLE), tensors)


def test_tensors_with_shared_memory_or_strides_are_written_correctly(tmp_path):
    table = TensorTable(
        [TensorSpec("q", (2, 4), "F32"), TensorSpec("k", (2, 4), "F32"), TensorSpec("t", (4, 2), "F32")]
    )
    fused = torch.arange(16.0).reshape(4, 4)
    whole = torch.arange(8.0).reshape(2, 4)
    read = open_anchor(write_anchor(tmp_path, table, {"q": fused[:2], "k": whole, "t": whole.t()}), table)
    assert torch.equal(read["q"], fused[:2])
    assert torch.equal(read["k"], whole)
    assert torch.equal(read["t"], whole.t())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer.scale": None}, "layer.scale is missing"),
        ({"other": torch.zeros(1)}, "other is not in the tensor table"),
        ({"layer.scale": torch.zeros(1).half()}, r"layer.scale is torch.float16\[1\]"),
        ({"layer.scale": torch.zeros(())}, r"layer.scale is torch.float32\[\]"),
    ],
)
def test_only_a_view_of_the_table_is_written(tmp_path, changes, message):
    tensors = {k: v for k, v in {**view_of(TABLE), **changes}.items() if v is not None}
    with pytest.raises(FormatError, match=message):
        write_anchor(tmp_path, TABLE, tensors)
    assert list(tmp_path.iterdir()) == []


def test_an_anchor_that_does_not_match_the_table_is_refused(tmp_path):
    paths = write_anchor(tmp_path, TABLE, view_of(TABLE))
    specs = list(TABLE)
    with pytest.raises(FormatError, match="more is missing"):
        open_anchor(paths, TensorTable([*specs, TensorSpec("more", (1,), "BF16")]))
    with pytest.raises(FormatError, match="not in the tensor table"):
        open_anchor(paths, TensorTable(specs[1:]))
    with pytest.raises(FormatError, match=r"embed\.weight is BF16"):
        open_anchor(paths, TensorTable([TensorSpec("embed.weight", (40, 16), "F16"), *specs[1:]]))
    with pytest.raises(FormatError, match=r"embed\.weight is BF16"):
        open_anchor(paths, TensorTable([TensorSpec("embed.weight", (16, 40), "BF16"), *specs[1:]]))


def test_a_damaged_anchor_is_refused(tmp_path):
    (path,) = write_anchor(tmp_path, TABLE, view_of(TABLE))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="damaged"):
        open_anchor([path], TABLE)


def test_an_anchor_that_cannot_be_written_is_an_error_of_the_disk(tmp_path):
    with pytest.raises(OSError, match=r"no such directory/model\.safetensors: "):
        write_anchor_file(tmp_path / "no such directory" / "model.safetensors", {"w": torch.zeros(2)})
