"""Delta parts and anchors as safetensors files.

A delta part holds four tensors (docs/FORMAT.md): `tensors`, one record for each changed tensor; `books`, the code
parameters; `chunks`, one row for each chunk of the coded tensors; `payload`, the bits. An anchor is an ordinary
checkpoint for `from_pretrained`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from hubsync.errors import ConfigError, FormatError
from hubsync.kernels.bits import TORCH_DTYPES
from hubsync.progress import progress

from .codec import CLASSES_OF, RECORD_COLUMNS, Encoded, OldBits, columns, decode, encode
from .codec.device import host_memory
from .codec.device_decode import DeviceDelta, Held, decode_on_device
from .device_patch import DevicePatch
from .documents import wrong_format
from .encoding import Encoding
from .manifest import Adapter, Manifest, Position, Run
from .patch import Patch, check
from .table import TensorTable

FORMAT = "hubsync-delta/2"

_DTYPES = {"tensors": ("U32", "<u4"), "books": ("U8", "u1"), "chunks": ("U8", "u1"), "payload": ("U8", "u1")}
_DIMENSIONS = {"tensors": 2, "books": 2, "chunks": 1, "payload": 1}
_LONGEST_HEADER = 1 << 16  # of a part as this version writes it


@dataclass(frozen=True)
class Transition:
    """The run of a delta, and the positions before and after it."""

    run_id: str
    parent: Position
    position: Position


def write_delta(
    table: TensorTable,
    patch: Patch | DevicePatch,
    transition: Transition,
    *,
    rank: int = 0,
    encoding: Encoding = Encoding.FAST,
    old: OldBits | None = None,
) -> memoryview:
    """The bytes of one part of a delta, not to be written to. The same arguments give the same bytes.

    Args:
        patch: the changes of this rank; may be empty. FormatError if it is not a sound patch of views of `table`. Of a
            `DevicePatch` only what is on the host is looked through.
        rank: the publisher rank; information only.
        encoding: fast or compact. A compact part is a third smaller or less; only `old` decodes it.
        old: the view of the parent, at least all of every tensor that changes. Only read where `encoding.needs_base`.
    """
    if isinstance(patch, DevicePatch):
        patch.check(table)
        check(table, patch.host)
    else:
        check(table, patch)
    metadata = {**_identity(table, transition), "encoding": encoding.value, "rank": str(rank)}
    if not encoding.needs_base:
        return _serialize(encode(table, patch), metadata)
    if old is None:
        raise ValueError(f"a {encoding} part is encoded against the weights of its parent: give them as `old`")
    return _serialize(encode(table, patch, old), metadata)


def read_delta(
    source: Path | bytes | memoryview, table: TensorTable, manifest: Manifest | None, old: OldBits | None = None
) -> Patch:
    """Decode one delta part; FormatError unless every byte of it makes sense for `table`.

    Args:
        source: the file or its bytes.
        manifest: the run, table, parent and position of the part must match it; None checks the table only.
        old: the weights that the delta applies to. Needed for a compact part (ConfigError without them). Chunks of
            which it holds nothing are left out. Wrong weights give a patch that is sound but wrong, or a FormatError:
            compare digests.
    """
    data = source.read_bytes() if isinstance(source, Path) else bytes(source)
    arrays, metadata = _parse(data)
    _check_identity(metadata, table, manifest)
    encoding = Encoding(metadata["encoding"])
    classes = CLASSES_OF[encoding]
    if encoding.needs_base and old is None:
        raise ConfigError(
            "delta part: it is compact, decodable only with the weights that it applies to: give them as `old` "
            "(`view_bits.ViewBits`), or publish with encoding='fast'"
        )
    if arrays["books"].shape[1] != columns(classes):
        raise FormatError(f"delta part: code books have {columns(classes)} bytes, not {arrays['books'].shape[1]}")
    try:
        return decode(table, **arrays, classes=classes, old=old)
    except FormatError as error:
        raise FormatError(f"delta part: {error}") from None


def read_delta_on_device(
    path: Path, table: TensorTable, manifest: Manifest, held: Held, old: OldBits | None = None
) -> DeviceDelta | None:
    """Decode one part on the GPU where its changes will be used. None if `read_delta` must read it.

    That is so for all that it may refuse, and for compact parts without `old`.

    Args:
        held: what this process holds there. Chunks of which it holds nothing are left out.
        old: the held weights, if the delta applies to them.
    """
    found = _laid_out(path)
    if found is None:
        return None
    arrays, metadata = found
    try:
        _check_identity(metadata, table, manifest)
    except FormatError:
        return None
    encoding = Encoding(metadata["encoding"])
    if arrays["books"].shape[1] != columns(CLASSES_OF[encoding]):
        return None
    return decode_on_device(table, **arrays, held=held, old=old)


def _laid_out(path: Path) -> tuple[dict[str, np.ndarray], Mapping[str, str]] | None:
    """The tensors and the metadata of a part that is laid out as `_serialize` does. None for any other.

    The parser of safetensors would copy the payload, and keep the interpreter's lock meanwhile. The file is read by one
    call without it, into memory that a GPU copies from directly.
    """
    with path.open("rb", buffering=0) as file:
        data = host_memory(os.fstat(file.fileno()).st_size)
        if file.readinto(data.data) != len(data):
            return None
    begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if begin > min(len(data), _LONGEST_HEADER):
        return None
    try:
        header = json.loads(data[8:begin].tobytes())
        arrays, expected, end = {}, {"__metadata__": header["__metadata__"]}, 0
        for name, (code, dtype) in _DTYPES.items():
            shape = header[name]["shape"]
            start, end = end, header[name]["data_offsets"][1]
            expected[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
            arrays[name] = data[begin + start : begin + end].view(dtype).reshape(shape)
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return None
    sound = header == expected and end == len(data) - begin and _are_numbers(header)
    sound = sound and all(array.ndim == _DIMENSIONS[name] for name, array in arrays.items())
    sound = sound and arrays["tensors"].shape[1] == RECORD_COLUMNS
    return (arrays, header["__metadata__"]) if sound else None


def _are_numbers(header: Mapping[str, Any]) -> bool:
    """Are sizes and offsets non-negative integers, and all metadata texts?"""
    if not isinstance(header["__metadata__"], dict):
        return False
    numbers = [number for name in _DTYPES for key in ("shape", "data_offsets") for number in header[name][key]]
    texts = [*header["__metadata__"], *header["__metadata__"].values()]
    return all(type(number) is int and number >= 0 for number in numbers) and all(type(t) is str for t in texts)


def _identity(table: TensorTable, transition: Transition) -> dict[str, str]:
    parent, position = transition.parent, transition.position
    return {
        "format": FORMAT,
        "run_id": transition.run_id,
        "table_hash": table.hash,
        "from": f"{parent.version}:{parent.digest}",
        "to": f"{position.version}:{position.digest}",
    }


def _check_identity(metadata: Mapping[str, str], table: TensorTable, manifest: Manifest | None) -> None:
    if metadata.get("format") != FORMAT:
        raise FormatError(f"delta part: {wrong_format(metadata.get('format'), FORMAT)}")
    if metadata.get("encoding") not in CLASSES_OF:
        raise FormatError(
            f"delta part: encoding {metadata.get('encoding')!r:.80} is not {' or '.join(CLASSES_OF)}; upgrade "
            "hubsync to read it"
        )
    expected = {"table_hash": table.hash}
    if manifest is not None:
        if manifest.parent is None:
            raise FormatError(f"delta part: the manifest of version {manifest.version} is not one of a delta")
        expected = _identity(table, Transition(manifest.run_id, manifest.parent, manifest.position))
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise FormatError(f"delta part: {key} is {metadata.get(key)!r:.80}, expected {value!r}")


def _serialize(encoded: Encoded, metadata: Mapping[str, str]) -> memoryview:
    """A safetensors file. The library's own writer is not deterministic (metadata order)."""
    header: dict[str, object] = {"__metadata__": metadata}
    buffers, end = [], 0
    for name, (code, dtype) in _DTYPES.items():
        array: np.ndarray = getattr(encoded, name)
        buffers.append(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8))
        start, end = end, end + buffers[-1].nbytes
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    front = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
    out = np.concatenate([front, *buffers], out=host_memory(len(front) + end))  # without the interpreter's lock
    return out.data


def _parse(data: bytes) -> tuple[dict[str, np.ndarray], Mapping[str, str]]:
    """The four tensors as arrays, and the metadata. safetensors' own parser checks the header and all offsets."""
    try:
        views = dict(safetensors.deserialize(data))
    except (safetensors.SafetensorError, ValueError) as error:
        raise FormatError(f"delta part: not a safetensors file, or a damaged one ({error})") from None
    if views.keys() != _DTYPES.keys():
        raise FormatError(f"delta part: holds {sorted(views)!r:.200} instead of {sorted(_DTYPES)}")
    arrays = {}
    for name, (code, dtype) in _DTYPES.items():
        view = views[name]
        shape = list(view["shape"])
        if view["dtype"] != code or len(shape) != _DIMENSIONS[name]:
            raise FormatError(f"delta part: {name} is {view['dtype']}{shape}")
        raw = np.frombuffer(view["data"], dtype)
        arrays[name] = raw.astype(raw.dtype.newbyteorder("="), copy=False).reshape(shape)
    if arrays["tensors"].shape[1] != RECORD_COLUMNS:
        raise FormatError(f"delta part: records have {RECORD_COLUMNS} columns, not {arrays['tensors'].shape[1]}")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return arrays, header.get("__metadata__") or {}


def write_anchor(
    directory: Path,
    table: TensorTable,
    tensors: Mapping[str, torch.Tensor],
    *,
    max_shard_bytes: int = 5 << 30,
    stem: str = "model",
) -> list[Path]:
    """Write a full published view as safetensors shards into an existing directory. Returns the files written.

    Writes one `model.safetensors`, or `model-00001-of-0000N.safetensors` and `model.safetensors.index.json` if the view
    is larger than `max_shard_bytes`. `stem` replaces `model`. FormatError if `tensors` is not a view of `table`.
    """
    for name in tensors.keys() - {spec.name for spec in table}:
        raise FormatError(f"anchor: {name} is not in the tensor table")
    for spec in table:
        if spec.name not in tensors:
            raise FormatError(f"anchor: {spec.name} is missing")
        tensor = tensors[spec.name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != TORCH_DTYPES[spec.dtype]:
            raise FormatError(
                f"anchor: {spec.name} is {tensor.dtype}{list(tensor.shape)}, "
                f"the table says {spec.dtype}{list(spec.shape)}"
            )
    files = anchor_files(table, max_shard_bytes, stem)
    with progress(f"writing {directory}", table.nbytes) as shown:
        for file, names in files.items():
            write_anchor_file(directory / file, {name: tensors[name] for name in names})
            shown.add(sum(tensors[name].nbytes for name in names))
    return [*(directory / file for file in files), *write_anchor_index(directory, table, files)]


def write_adapter(directory: Path, run: Run, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a view of an adapter run into an existing directory, in the layout that PEFT and vLLM load."""
    assert run.adapter is not None
    write_anchor(directory, run.table, tensors, stem=run.stem)
    write_adapter_config(directory, run.adapter)


def write_adapter_config(directory: Path, adapter: Adapter) -> None:
    (directory / "adapter_config.json").write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")


def anchor_files(table: TensorTable, max_shard_bytes: int = 5 << 30, stem: str = "model") -> dict[str, list[str]]:
    """File name -> names of its tensors, in table order: the files of `write_anchor` without the index."""
    shards = _shards(table, max_shard_bytes)
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, 1)}


def write_anchor_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One shard of an anchor. OSError if it cannot be written."""
    try:
        safetensors.torch.save_file(_owned(tensors), path, {"format": "pt"})
    except safetensors.SafetensorError as error:  # of a full disk too
        raise OSError(f"{path}: {error}") from error


def write_anchor_index(directory: Path, table: TensorTable, files: Mapping[str, Sequence[str]]) -> list[Path]:
    """Write `model.safetensors.index.json` if there are several shards. Returns the files written."""
    if len(files) == 1:
        return []
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": table.nbytes}, "weight_map": weight_map}
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n")
    return [path]


def open_anchor(paths: Sequence[Path], table: TensorTable) -> Mapping[str, torch.Tensor]:
    """A full published view, read lazily: indexing reads one tensor.

    FormatError unless names, shapes and dtypes match the table. Files that are not safetensors files (an index, a
    tokenizer) are ignored.
    """
    return _Anchor([path for path in paths if path.suffix == ".safetensors"], table)


class _Anchor(Mapping[str, torch.Tensor]):
    def __init__(self, paths: Sequence[Path], table: TensorTable):
        self._names = [spec.name for spec in table]
        self._files: dict[str, safetensors.safe_open] = {}
        for path in paths:
            try:
                file = safetensors.safe_open(path, framework="pt", device="cpu")
                keys = list(file.keys())
            except (safetensors.SafetensorError, ValueError) as error:
                raise FormatError(
                    f"anchor: {path.name} is not a safetensors file, or a damaged one ({error})"
                ) from None
            for name in keys:
                if name in self._files or name not in table:
                    raise FormatError(f"anchor: {name} occurs twice or is not in the tensor table")
                self._files[name] = file
        for spec in table:
            if spec.name not in self._files:
                raise FormatError(f"anchor: {spec.name} is missing")
            view = self._files[spec.name].get_slice(spec.name)
            if tuple(view.get_shape()) != spec.shape or view.get_dtype() != spec.dtype:
                raise FormatError(
                    f"anchor: {spec.name} is {view.get_dtype()}{view.get_shape()}, "
                    f"the table says {spec.dtype}{list(spec.shape)}"
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _shards(table: TensorTable, max_shard_bytes: int) -> list[list[str]]:
    """Names of the tensors of each shard, in table order. A tensor larger than the limit gets its own shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for spec in table:
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec.name)
        size += spec.nbytes
    return shards


def _owned(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors that share no memory: safetensors rejects shared memory (ties, slices of one buffer)."""
    out: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, held in tensors.items():
        tensor = held.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        out[name] = tensor
    return out
