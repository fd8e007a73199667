"""An anchor of version 0 without an upload: the Hub copies the files of a base model that is in a Hub repository."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download

from hubsync.bucket import Bucket
from hubsync.chain import Layout
from hubsync.chain.part_files import anchor_sources, upload_parts
from hubsync.errors import BucketError, FormatError
from hubsync.format.checkpoint import shards_of
from hubsync.format.digest import digest_view
from hubsync.format.manifest import Base, Manifest, Part, Run
from hubsync.format.parts import open_anchor

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"


def copy_base(bucket: Bucket, run: Run, draft: Manifest, side_files: Callable[[Path], None]) -> tuple[Part, ...] | None:
    """The parts of an anchor of version 0: weights copied inside the Hub, and small side files uploaded.

    None if that is not possible: the base is no repository at a fixed revision, its files in the local cache are no bit
    for bit copy of the view, or the storage cannot copy.
    """
    if run.base.model is None or run.base.revision is None:
        return None
    directory = local_copy(run.base)
    if directory is None or not _is_the_view(directory, run):
        return None
    paths = {file.name: Layout.part(draft, Part(0, "", file=file.name)) for file in shards_of(directory)}
    try:
        copied = bucket.copy_in(run.base.model, run.base.revision, paths)
    except BucketError as error:
        logger.warning("the Hub did not copy %s, uploading the model instead: %s", run.base.model, error)
        return None
    if copied is None:
        return None
    weights = tuple(Part(copied[path].size, copied[path].sha256, file=name) for name, path in paths.items())
    with tempfile.TemporaryDirectory(prefix="hubsync-anchor-") as side:
        side_files(Path(side))
        if (directory / _INDEX).exists():
            shutil.copyfile(directory / _INDEX, Path(side, _INDEX))
        return (*weights, *upload_parts(bucket, draft, anchor_sources(Path(side))))


def local_copy(base: Base) -> Path | None:
    """Directory of the base checkpoint on this machine; None if there is none."""
    if base.model is not None and Path(base.model).is_dir():
        return Path(base.model)
    try:
        return Path(snapshot_download(str(base.model), revision=base.revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or not the name of a repository
        return None


def _is_the_view(directory: Path, run: Run) -> bool:
    """Whether the files hold exactly version 0: its tensors and no others, in the served dtypes."""
    try:
        return digest_view(run.table, open_anchor(shards_of(directory), run.table)).hex == run.digest
    except FormatError:
        return False
