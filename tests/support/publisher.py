"""A run whose versions change a hundredth of all elements, without a training."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from hubsync.bucket import open_bucket
from hubsync.chain import ChainWriter
from hubsync.format.digest import digest_view
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Position, Run
from hubsync.format.parts import Transition, write_anchor, write_delta
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.format.view_bits import ViewBits
from hubsync.kernels.bits import bits_of, dtype_code

from .toy import patch_between

RUN_ID = "feedc0de" * 4


class Publisher:
    """A run whose versions change 1 % of the elements of every tensor, and a checkpoint of each version.

    Args:
        names: of all tensors, in the order of a trainer that will continue the run.
    """

    def __init__(self, root: Path, base: Path, run_id: str = RUN_ID, *, names: Sequence[str] | None = None):
        self.run_id = run_id
        self.root = root
        self.base = base
        tensors = load_file(base / "model.safetensors")
        self.views = [{name: tensors[name] for name in names or tensors}]
        self.table = TensorTable(
            [TensorSpec(name, tuple(tensor.shape), dtype_code(tensor.dtype)) for name, tensor in self.views[0].items()]
        )
        self.positions = [Position(0, digest_view(self.table, self.views[0]).hex)]
        self.address = str(root / "bucket")
        run = Run(run_id, self.table, self.positions[0].digest, created=time.time())
        self.writer = ChainWriter.create(open_bucket(self.address, create=True), run)

    def publish(
        self, version: int, change: Callable[[np.ndarray, np.ndarray], np.ndarray], *, compact: bool = False
    ) -> Position:
        """Publish a version. `change(bits, random 16-bit patterns)` returns new bits of the chosen elements."""
        generator = np.random.default_rng(version)
        new = {name: tensor.clone() for name, tensor in self.views[-1].items()}
        for tensor in new.values():
            bits = bits_of(tensor)
            chosen = generator.choice(len(bits), max(1, len(bits) // 100), replace=False)
            bits[chosen] = change(bits[chosen], generator.integers(0, 1 << 16, len(chosen), dtype=np.uint16))
        position = Position(version, digest_view(self.table, new).hex)
        patch = patch_between(self.views[-1], new, self.table)
        old = ViewBits(self.table, self.views[-1]) if compact else None
        encoding = Encoding.COMPACT if compact else Encoding.FAST
        part = write_delta(
            self.table, patch, Transition(self.run_id, self.positions[-1], position), encoding=encoding, old=old
        )
        changed = sum(map(len, patch.values()))
        self.writer.commit_delta([part], digest=position.digest, changed=changed, encoding=encoding)
        self.views.append(new)
        self.positions.append(position)
        return position

    def checkpoint(self, version: int) -> Path:
        directory = self.root / f"version-{version}"
        directory.mkdir()
        write_anchor(directory, self.table, self.views[version])
        (directory / "config.json").write_bytes((self.base / "config.json").read_bytes())
        return directory


def small_steps(bits: np.ndarray, _random: np.ndarray) -> np.ndarray:
    return bits ^ np.uint16(3)


def any_bits(_bits: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Random bits with NaN payloads, infinities and both zeros: no model works with it, but each byte must arrive."""
    return random
