"""Rebuild a published view on the CPU from a plan, as a replica does, without a server."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hubsync.errors import NoPath, WrongParent
from hubsync.format.digest import Digest, digest_change, digest_view, tensor_seed
from hubsync.format.manifest import Position
from hubsync.format.parts import open_anchor
from hubsync.format.patch import Patch, changes_of, invert
from hubsync.format.table import TensorTable
from hubsync.format.view_bits import ViewBits
from hubsync.kernels.bits import TORCH_DTYPES, bits_of
from hubsync.progress import progress

from .planner import Plan, Step
from .reader import ChainReader


class View:
    """Every tensor of a table in its served dtype, and its position in the chain.

    Attributes:
        tensors: name -> contiguous CPU tensor in checkpoint shape.
        position: version and digest. The digest always is that of the tensors.
        bits: the weights that compact deltas from here are decoded against.
    """

    def __init__(self, table: TensorTable, tensors: Mapping[str, torch.Tensor], position: Position):
        """Copy the tensors, cast to the served dtypes. WrongParent if their digest is not `position.digest`."""
        self.table = table
        self.tensors = {
            spec.name: tensors[spec.name].detach().to("cpu", TORCH_DTYPES[spec.dtype], copy=True).contiguous()
            for spec in table
        }
        self.bits = ViewBits(table, self.tensors)
        self._digest = digest_view(table, self.tensors)
        self._require(self._digest, position)
        self.position = position

    def apply(self, patch: Patch, step: Step) -> None:
        """Apply a step. `patch` is the decoded delta of its manifest.

        WrongParent if it starts at another position or does not lead to the digest of its end. Then nothing changes.
        """
        if step.start != self.position:
            raise WrongParent(f"the step to {step.end} applies to {step.start}, not to {self.position}")
        digest, writes = self._digest, []
        for index, delta in (invert(patch) if step.inverse else patch).items():
            spec = self.table[index]
            bits = bits_of(self.tensors[spec.name])
            indices, old, new = changes_of(delta, bits)
            writes.append((bits, indices, new))
            digest += digest_change(tensor_seed(spec.name), indices, old, new)
        self._require(digest, step.end)
        for bits, indices, new in writes:
            bits[indices] = new
        self._digest, self.position = digest, step.end

    def verify(self) -> None:
        """Recompute the digest from the tensors. WrongParent if it is not that of `position`."""
        self._digest = digest_view(self.table, self.tensors)
        self._require(self._digest, self.position)

    @staticmethod
    def _require(digest: Digest, position: Position) -> None:
        if digest.hex != position.digest:
            hint = "" if position.version else ". Use the model and the revision that the run's base names"
            raise WrongParent(f"the weights have digest {digest.hex}, but {position} has {position.digest}{hint}")


def replay(reader: ChainReader, plan: Plan, base: Mapping[str, torch.Tensor] | None = None) -> View:
    """Download the objects of a plan and rebuild the view it ends at. Every step is checked against its digest.

    Args:
        base: the tensors that the plan starts from, if not from an anchor: those of the base checkpoint, or of
            `plan.start`. Name -> tensor in checkpoint shape.

    Raises:
        NoPath: the plan needs `base`.
        WrongParent: the weights do not have the digest that the chain states.
        BucketError, FormatError: a part is missing, damaged or malformed.
    """
    dense = reader.run().table.nbytes
    nbytes = sum(step.manifest.nbytes for step in plan.steps)
    with progress(f"rebuilding {plan.target}", 2 * dense + nbytes) as shown:
        view = _start(reader, plan, base)
        shown.add(dense)
        for step in plan.steps:
            view.apply(reader.patch(step.manifest, view.bits), step)
            shown.add(step.manifest.nbytes)
        view.verify()
        return view


def _start(reader: ChainReader, plan: Plan, base: Mapping[str, torch.Tensor] | None) -> View:
    run = reader.run()
    if plan.anchor is not None:
        return View(run.table, open_anchor(reader.fetch(plan.anchor), run.table), plan.anchor.position)
    if base is None:
        raise NoPath("the path starts from weights that are not in the bucket: pass the base checkpoint")
    return View(run.table, base, run.origin if plan.base else plan.start or run.origin)
