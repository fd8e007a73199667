"""Savings of compressing whole checkpoints, compared with the Hub's storage (Xet), which already compresses.

    python -m benchmarks.anchors --trace DIR       base.safetensors, and the snapshot after its last step
    python -m benchmarks.anchors                   a generated synthetic pair

hf_xet uploads to an embedded Hub. The chunks are measured as they arrive, compressed as on the real Hub.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import zstandard
from rich.console import Console
from rich.table import Table

from hubsync.format.parts import write_anchor

from .codec import tensors_of
from .measuring import timed
from .snapshots import Pair, add_arguments, chosen

_TOKEN = "hf_benchmark"


def _zstd(level: int) -> Callable[[bytes], bytes]:
    return zstandard.ZstdCompressor(level=level).compress


def _byte_planes(data: bytes) -> bytes:
    """All low bytes of the elements, then all high ones: sign, exponent and a bit of mantissa."""
    planes = np.frombuffer(data, np.uint8).reshape(-1, 2)
    return planes[:, 0].tobytes() + planes[:, 1].tobytes()


def _exponents(data: bytes) -> bytes:
    """All sign and mantissa bytes, then all exponents."""
    bits = np.frombuffer(data, np.uint16)
    rest = (bits >> 8 & 0x80 | bits & 0x7F).astype(np.uint8)
    return rest.tobytes() + (bits >> 7 & 0xFF).astype(np.uint8).tobytes()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "uncompressed": bytes,
    "zstd-1": _zstd(1),
    "zstd-9": _zstd(9),
    "byte planes + zstd-1": lambda data: _zstd(1)(_byte_planes(data)),
    "byte planes + zstd-9": lambda data: _zstd(9)(_byte_planes(data)),
    "separate exponents + zstd-1": lambda data: _zstd(1)(_exponents(data)),
}


def _anchor(pair: Pair, weights: np.ndarray, directory: Path) -> Path:
    directory.mkdir()
    return write_anchor(directory, pair.table, tensors_of(pair, weights))[0]


def _uploaded(files: Sequence[Path], root: Path) -> list[int]:
    """Bytes that each file adds to a Hub's storage when the files are uploaded in this order."""
    os.environ.update(HF_XET_CACHE=str(root / "xet"), HF_HOME=str(root / "hf"), HF_XET_TELEMETRY_ENABLED="false")
    from hubsync.bucket.base import Upload
    from hubsync.bucket.hub import HubBucket  # hf_xet reads its settings when it is imported
    from hubsync.localhub import LocalHub

    storage = root / "storage"
    storage.mkdir()
    sizes = [0]
    with LocalHub(storage, tokens={_TOKEN}) as hub:
        bucket = HubBucket("hf://buckets/me/anchors/run", create=True, token=_TOKEN, endpoint=hub.url)
        for number, file in enumerate(files):
            bucket.put([Upload(f"{number}.safetensors", file)])
            sizes.append(sum(path.stat().st_size for path in storage.rglob("xorbs/*")))
    return np.diff(sizes).tolist()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.anchors", description=__doc__.split("\n")[0])
    add_arguments(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pairs = list(chosen(parser, options))
    first, last = pairs[0], pairs[-1]
    size = first.old.nbytes
    table = Table(f"anchor of {size / 1e6:.1f} MB of bf16")
    for heading in ("MB", "of plain", "CPU s"):
        table.add_column(heading, justify="right")
    for name, compress in COMPRESSIONS.items():
        data, seconds = timed(compress, first.old.tobytes())
        table.add_row(name, f"{len(data) / 1e6:.2f}", f"{len(data) / size:.3f}", f"{seconds:.2f}")
    with tempfile.TemporaryDirectory(prefix="hubsync-benchmark-") as name:
        root = Path(name)
        files = [_anchor(first, first.old, root / "a"), _anchor(last, last.new, root / "b")]
        stored = _uploaded(files, root)
    names = ("plain safetensors, as Xet stores it", f"the same after {len(pairs)} steps, with the first one stored")
    for name, nbytes in zip(names, stored, strict=True):
        table.add_row(name, f"{nbytes / 1e6:.2f}", f"{nbytes / size:.3f}", "")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
