"""Joining a run: create or resume it, and bring it to the weights that the model holds now."""

from __future__ import annotations

import logging
import secrets
import tempfile
import time

import torch

from hubsync.bucket import Bucket
from hubsync.chain import ChainReader, ChainWriter, Layout, VersionInfo
from hubsync.chain.creation import claimed
from hubsync.errors import BucketError, FormatError, NoPath, RunMismatch
from hubsync.format.checkpoint import kept_dtypes
from hubsync.format.digest import Digest
from hubsync.format.keys import SigningKey
from hubsync.format.manifest import Position, Run
from hubsync.format.patch import Patch, TensorValues, invert
from hubsync.format.table import TensorTable
from hubsync.format.view_bits import ViewBits, digest_after
from hubsync.kernels.bits import bits_of, dtype_code
from hubsync.publish.detect.base import Detector
from hubsync.publish.view.adapters import require_same_adapter
from hubsync.publish.view.stated import Stated

from .publisher import Publisher
from .trained_model import TrainedModel

logger = logging.getLogger(__name__)


def open_writer(
    bucket: Bucket, model: TrainedModel, table: TensorTable, digest: Digest, key: SigningKey | None, resume: bool
) -> ChainWriter:
    """Resume the run in a bucket, or create it with the model's weights as version 0. For rank 0.

    RunMismatch if the run is one of another model, or if there is one although `resume` is False.
    """

    def new_run() -> Run:
        return Run(
            run_id=secrets.token_hex(16),
            table=table,
            digest=digest.hex,
            base=model.base_for(table, digest),
            created=time.time(),
            public_key=None if key is None else key.public.hex,
            adapter=model.adapter,
        )

    with claimed(bucket, new_run) as run:
        if run is not None:
            return ChainWriter.create(bucket, run)
        if not resume:
            raise RunMismatch(
                f"{bucket.address} already holds a run, and resume is False: choose another prefix for a new run"
            )
        writer = ChainWriter.resume(bucket, table, signs=key is not None)
        require_same_adapter(writer.run.adapter, model.adapter)
        return writer


def stated_in_run(bucket: Bucket, dtype: torch.dtype) -> Stated | None:
    """What the run in a bucket has: shapes, and tensors of another dtype than `dtype`. A trainer may lack the base.

    None if there is no run, or one that is served in another dtype.
    """
    data = bucket.read([Layout.RUN]).get(Layout.RUN)
    if data is None:
        return None
    specs = {spec.name: (spec.shape, spec.dtype) for spec in Run.loads(data).table}
    kept, code = kept_dtypes(specs), dtype_code(dtype)
    others = {name: known for name, (_, known) in specs.items() if known != code}
    return Stated({name: shape for name, (shape, _) in specs.items()}, kept) if kept == others else None


def bring_to_model(publisher: Publisher, digest: Digest, name: str | None) -> None:
    """Commit a version if the run's newest one does not hold the model's weights. All ranks call it.

    If the model is at an older version of the run, the version is a delta back to it; otherwise an anchor.

    Args:
        digest: digest of the model's weights.
        name: name of the version.
    """
    writer, ranks, info = publisher.writer, publisher.ranks, VersionInfo(name=name)
    if writer.position.digest == digest.hex:
        if writer.newest is None and writer.run.base.model is None:
            publisher.anchors.commit(ranks)  # also if the run's creator died before this upload
        return
    # With several ranks, each would need the whole model to compute the delta.
    patch = _patch_back(writer.bucket, writer.position, publisher.detector) if ranks.size == 1 else None
    if patch is not None:
        publisher.commit_patch(patch, digest.hex, info)
        logger.info("the model is at an older version of the run: published it as %s, by a delta", writer.position)
        return
    logger.warning(
        "the model is not at the run's newest %s: uploading it whole, the run goes on from there", writer.position
    )
    publisher.anchors.commit(ranks, info, Position(writer.next_version(ranks), digest.hex))


def _patch_back(bucket: Bucket, newest: Position, detector: Detector) -> Patch | None:
    """The patch from the run's newest version back to the detector's view; None if that is no version of the chain."""
    with tempfile.TemporaryDirectory(prefix="hubsync-") as cache:
        reader = ChainReader(bucket, cache)
        try:
            older = reader.find(detector.digest.hex)
            if older is None:
                return None
            # Forwards, from weights that are available: so compact deltas can be decoded, too.
            plan = reader.plan(older, to=newest.version)
            if plan.start is None or plan.target != newest:
                return None
            tensors = detector.tensors()
            patch = reader.merged(plan.steps, ViewBits(detector.table, tensors))
        except (BucketError, FormatError, NoPath) as error:
            logger.warning("the deltas since the model's version cannot be read: %s", error)
            return None
    if digest_after(detector.table, tensors, detector.digest, patch).hex != newest.digest:
        logger.warning("the deltas from %s do not reproduce %s", older, newest)
        return None
    changes = invert({index: delta for index, delta in patch.items() if not isinstance(delta, TensorValues)})
    return changes | {
        index: TensorValues(bits_of(tensors[detector.table[index].name].cpu()))
        for index, delta in patch.items()
        if isinstance(delta, TensorValues)
    }
