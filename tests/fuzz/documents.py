"""Manifests, heads, run.json, gc.json, and the headers of anchors and delta parts.

Checksums are computed anew after a mutation, so that it reaches the parser behind them.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from hubsync.bucket.names import is_name
from hubsync.chain.layout import Layout, epoch_names, merged_names
from hubsync.errors import FormatError
from hubsync.format.documents import seal, unseal
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Adapter, Base, Head, Manifest, Part, Position, Run
from hubsync.format.parts import Transition, open_anchor, read_delta, write_delta
from hubsync.format.patch import TensorDelta
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.format.times import Times

from .bytestrings import mutated

REJECTIONS = (FormatError,)
TABLE = TensorTable([TensorSpec("w", (4, 4), "BF16"), TensorSpec("b", (), "F32")])
_DEEPEST = 40  # levels of a document that are looked for values to change

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 1 << 31, (1 << 53) + 1, 1 << 62, 1 << 63, 10**30, 0.0, -0.5, 1e9, 1e300),
    *(float("nan"), float("inf"), "", "a", "0", "delta", "anchor", "merged", "fast", "compact", "dense", "hubsync/1"),
    *("model.safetensors", "../model.safetensors", "/etc/passwd", "config.json", "a" * 32, "A" * 32, "a" * 64),
    *(
        "00000001-0123abcd",
        "compact-0123abcd",
        "a\0b",
        "\ud800",
        "é" * 300,
        [],
        {},
        [[]],
        [1, 2],
        ["w", [4, 4], "BF16"],
    ),
    *({"version": 1, "digest": "1" * 32}, {"size": 1, "sha256": "c" * 64, "rank": 0, "file": None}),
)


@functools.cache
def seeds() -> list[bytes]:
    """One input of each kind: a byte for the kind, then the document."""
    first, second = Position(1, "1" * 32), Position(2, "2" * 32)
    part = Part(10, "c" * 64)
    files = (Part(10, "c" * 64, 0, "model.safetensors"), Part(10, "c" * 64, 0, "config.json"))
    run, table, epoch = "a" * 32, TABLE.hash, "00000001-0123abcd"
    delta = Manifest("delta", run, table, epoch, second, first, epoch, (part,), 3, 1e9, 7, "name", serve=1, expires=2e9)
    delta = replace(delta, absolute=1, times=Times((1e9, 1e9), (1e9, 2e9), (2e9, 2e9)))
    anchor = Manifest("anchor", run, table, epoch, second, None, None, files, 0, 1e9, encoding=Encoding.FAST)
    merged = Manifest("merged", run, table, "compact-0123abcd", second, first, epoch, (part,), 3, 1e9)
    adapter = Adapter({"r": 8, "lora_alpha": 16}, Base("m", None), "e" * 32)
    whole = Run(run, TABLE, "1" * 32, Base("m/x", "r"), 1e9, "d" * 64, adapter)
    garbage = seal({"format": json.loads(delta.dumps())["format"], "since": {Layout.manifest(delta): 1e9}})
    names = "\n".join([Layout.manifest(m) for m in (delta, anchor, merged)] + [Layout.epoch(epoch)]).encode()
    found = [
        *(("manifest", manifest.dumps()) for manifest in (delta, anchor, merged)),
        ("head", Head(delta, 1, 1e9).dumps()),
        ("run", whole.dumps()),
        ("garbage", garbage),
        ("names", names),
        ("anchor", _anchor_header()),
        ("part", _part_header()),
    ]
    kinds = list(_READERS)
    return [bytes([kinds.index(kind)]) + content for kind, content in found]


def warm_up() -> None:
    """Read the seeds: each is sound."""
    for seed in seeds():
        read(seed)


def make(rng: Random) -> bytes:
    """A mutated document of any kind."""
    return mutate(rng.choice(seeds()), rng)


def mutate(data: bytes, rng: Random) -> bytes:
    """Change values of the JSON document, mostly; else its bytes."""
    if not data:
        return rng.choice(seeds())
    if rng.random() < 0.75:
        try:
            return data[:1] + json.dumps(_changed(json.loads(data[1:]), rng)).encode()
        except (ValueError, RecursionError):
            pass
    return data[:1] + mutated(data[1:], rng)


def read(data: bytes) -> None:
    """Read one document as a replica does."""
    if data:
        list(_READERS.values())[data[0] % len(_READERS)](data[1:])


# --- readers


def _read_manifest(text: bytes) -> None:
    manifest = Manifest.loads(_resealed(text))
    names = [Layout.manifest(manifest), *(Layout.part(manifest, part) for part in manifest.parts)]
    assert all(is_name(name) for name in names), f"an unsafe object name of {names}"
    assert Manifest.loads(manifest.dumps()) == manifest


def _read_head(text: bytes) -> None:
    head = Head.loads(_resealed(text))
    assert Head.loads(head.dumps()) == head


def _read_run(text: bytes) -> None:
    run = Run.loads(_resealed(text))
    again = Run.loads(run.dumps())
    # An adapter's config may hold NaN, which is not equal to itself.
    assert (again.table, again.origin, again.base, again.public_key) == (
        run.table,
        run.origin,
        run.base,
        run.public_key,
    )


def _read_garbage(text: bytes) -> None:
    unseal(_resealed(text), Layout.GARBAGE)


def _read_names(text: bytes) -> None:
    names = text.decode(errors="replace").split("\n")
    for epoch, found in epoch_names(names).items():
        assert is_name(Layout.epoch(epoch))
        assert all(0 <= version < 10**8 for version in found.versions)
    merged_names(names)


def _read_anchor(header: bytes) -> None:
    with tempfile.TemporaryDirectory(dir=_memory_directory()) as directory:
        path = Path(directory, "model.safetensors")
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(TABLE.nbytes))
        view = open_anchor([path], TABLE)
        for spec in TABLE:
            assert view[spec.name].shape == spec.shape


def _read_part(header: bytes) -> None:
    read_delta(len(header).to_bytes(8, "little") + header + _part_content(), TABLE, None)


_READERS: dict[str, Callable[[bytes], None]] = {
    "manifest": _read_manifest,
    "head": _read_head,
    "run": _read_run,
    "garbage": _read_garbage,
    "names": _read_names,
    "anchor": _read_anchor,
    "part": _read_part,
}


# --- making


def _resealed(text: bytes) -> bytes:
    """With the checksums that the content asks for, if it is a JSON object."""
    try:
        document = json.loads(text)
        if not isinstance(document, dict):
            return text
        document.pop("checksum", None)
        if isinstance(document.get("table"), list):
            document["table_hash"] = TensorTable.from_json(document["table"]).hash
        return seal(document)
    except (ValueError, RecursionError, FormatError):
        return text


def _changed(document: Any, rng: Random) -> Any:
    """A copy of a JSON value with some values in it replaced, removed, added or exchanged."""
    document = deepcopy(document)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(document))
        if not places:
            return rng.choice(_VALUES)
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0 | 1:
                holder[key] = deepcopy(rng.choice(_VALUES))
            case 2:
                del holder[key]
            case 3:
                other, there = rng.choice(places)
                try:
                    holder[key] = deepcopy(other[there])
                except (LookupError, TypeError):  # removed above
                    pass
            case 4:
                holder[key] = _nudged(holder[key], rng)
            case _:
                if isinstance(holder, list):
                    holder.extend(deepcopy(holder[key : key + 1]) * rng.choice([1, 2, 50]))
                else:
                    holder[rng.choice(["step", "x", key + "x"])] = deepcopy(rng.choice(_VALUES))
    return document


def _nudged(value: Any, rng: Random) -> Any:
    """A value near this one."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return rng.choice([value + 1, value - 1, -value, value * 2, float(value)])
    if isinstance(value, str):
        return mutated(value.encode(errors="replace"), rng).decode(errors="replace")
    return [value]


def _places(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    if depth > _DEEPEST or not isinstance(value, (dict, list)):
        return []
    found = []
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        found.append((value, key))
        found += _places(inner, depth + 1)
    return found


def _anchor_header() -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in TABLE:
        offsets = [end, end := end + spec.nbytes]
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
    return json.dumps(header).encode()


@functools.cache
def _part() -> bytes:
    patch = {0: TensorDelta(np.array([1, 5]), np.array([1, -1], np.int16))}
    return bytes(write_delta(TABLE, patch, Transition("a" * 32, Position(1, "1" * 32), Position(2, "2" * 32))))


def _part_header() -> bytes:
    part = _part()
    return part[8 : 8 + int.from_bytes(part[:8], "little")]


def _part_content() -> bytes:
    part = _part()
    return part[8 + int.from_bytes(part[:8], "little") :]


def _memory_directory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
