"""A run with real parts and a small random view, and readers whose replayed views are checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from hubsync.bucket.base import Bucket
from hubsync.chain import ChainReader, ChainWriter, Plan, VersionInfo
from hubsync.chain.replay import replay
from hubsync.format.digest import digest_view
from hubsync.format.encoding import Encoding
from hubsync.format.manifest import Base, Manifest, Position, Run
from hubsync.format.parts import Transition, write_anchor, write_delta
from hubsync.format.patch import TensorValues, changed
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.format.view_bits import ViewBits
from hubsync.kernels.bits import bits_of

from .toy import patch_between

RUN_ID = "0badcafe" * 4

View = dict[str, torch.Tensor]


class History:
    """Publishes random changes of `rows x 64` and 64 elements, and keeps every committed view."""

    def __init__(self, bucket: Bucket, rows: int = 16, fraction: float = 0.05, public_key: str | None = None):
        self.bucket = bucket
        self.table = TensorTable([TensorSpec("weight", (rows, 64), "BF16"), TensorSpec("bias", (64,), "BF16")])
        self._random = np.random.default_rng(0)
        self._fraction = fraction
        view = {spec.name: torch.zeros(spec.shape, dtype=torch.bfloat16) for spec in self.table}
        for tensor in view.values():
            bits = bits_of(tensor)
            bits[:] = self._random.integers(0x3C00, 0x3D00, len(bits), dtype=np.uint16)
        self.base = view
        origin = Position(0, digest_view(self.table, view).hex)
        self.views: dict[Position, View] = {origin: view}
        self.writer = ChainWriter.create(
            bucket, Run(RUN_ID, self.table, origin.digest, Base("base/model"), 1.0, public_key)
        )

    @property
    def view(self) -> View:
        return self.views[self.writer.position]

    def publish(
        self, *, compact: bool = False, serve: bool = True, expires: float | None = None, absolute: tuple[int, ...] = ()
    ) -> Manifest:
        """Publish a version in which some elements have changed by one or two steps.

        Args:
            absolute: table indices of the tensors that are published with new values instead of changes.
        """
        new = {name: tensor.clone() for name, tensor in self.view.items()}
        for tensor in new.values():
            bits = bits_of(tensor)
            chosen = self._random.choice(len(bits), max(1, int(len(bits) * self._fraction)), replace=False)
            bits[chosen] += self._random.integers(1, 3, len(chosen), dtype=np.uint16)
        return self.publish_view(new, compact=compact, serve=serve, expires=expires, absolute=absolute)

    def publish_view(
        self,
        new: View,
        *,
        compact: bool = False,
        serve: bool = True,
        expires: float | None = None,
        absolute: tuple[int, ...] = (),
    ) -> Manifest:
        writer = self.writer
        patch = patch_between(self.view, new, self.table)
        patch |= {index: TensorValues(bits_of(new[self.table[index].name])) for index in absolute}
        position = Position(writer.next_version, digest_view(self.table, new).hex)
        old = ViewBits(self.table, self.view) if compact else None
        encoding = Encoding.COMPACT if compact else Encoding.FAST
        part = write_delta(self.table, patch, Transition(RUN_ID, writer.position, position), encoding=encoding, old=old)
        manifest = writer.commit_delta(
            [part],
            digest=position.digest,
            changed=changed(patch),
            encoding=encoding,
            absolute=len(absolute),
            info=VersionInfo(serve=serve, expires=expires),
        )
        self.views[position] = new
        return manifest

    def anchor(self, directory: Path) -> Manifest:
        directory.mkdir(exist_ok=True)
        write_anchor(directory, self.table, self.view)
        return self.writer.commit_anchor(directory, at=self.writer.position)

    def resume(self) -> None:
        self.writer = ChainWriter.resume(self.bucket, self.table)

    def reader(self, cache: Path) -> ChainReader:
        return ChainReader(self.bucket, cache)

    def go(self, reader: ChainReader, have: Position | None, to: int | None = None, base: bool = True) -> Plan:
        """Replay from the view at `have` as a replica does, and check every digest and the result."""

        def along(plan: Plan) -> Plan:
            view = replay(reader, plan, self.views[plan.start] if plan.start is not None else self.base)
            assert view.position == plan.target
            assert all(torch.equal(view.tensors[name], tensor) for name, tensor in self.views[plan.target].items())
            return plan

        return reader.carry_out(lambda: reader.plan(have, to, base_available=base), along)
