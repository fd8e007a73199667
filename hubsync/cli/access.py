"""Open the run that a command line names."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hubsync.bucket import Bucket, open_bucket
from hubsync.chain import ChainReader
from hubsync.errors import ConfigError
from hubsync.format.keys import PublicKey, SigningKey
from hubsync.format.manifest import Manifest

if TYPE_CHECKING:
    from hubsync.format.checkpoint import Checkpoint


def public_key(args: argparse.Namespace) -> PublicKey | None:
    """The key of `--public-key`."""
    return None if args.public_key is None else PublicKey.load(args.public_key)


@contextmanager
def reading(args: argparse.Namespace, *, max_head_age: float | None = None) -> Iterator[ChainReader]:
    """A reader of the run at `args.address`, with a temporary cache that lives as long as the context."""
    bucket = open_bucket(args.address, token=args.token, key=public_key(args))
    with tempfile.TemporaryDirectory(prefix="hubsync-") as cache:
        yield ChainReader(bucket, cache, max_head_age=max_head_age)


@contextmanager
def writing(args: argparse.Namespace) -> Iterator[tuple[Bucket, ChainReader]]:
    """The bucket at `args.address`, which signs with `--signing-key`, and a reader of its run as in `reading`.

    Raises:
        ConfigError: the run is signed and no key was given. Readers would reject unsigned documents.
    """
    key = None if args.signing_key is None else SigningKey.load(args.signing_key)
    bucket = open_bucket(args.address, token=args.token, key=key)
    with tempfile.TemporaryDirectory(prefix="hubsync-") as cache:
        reader = ChainReader(bucket, cache)
        if reader.run().public_key is not None and key is None:
            raise ConfigError("this run is signed: give the file of its secret key with --signing-key")
        yield bucket, reader


def base_checkpoint(args: argparse.Namespace, reader: ChainReader) -> Checkpoint | None:
    """Tensors of version 0: from `--base`, else from the run's base model if that is a directory on this machine."""
    model = reader.run().base.model
    directory: Path | None = args.base or (Path(model) if model is not None and Path(model).is_dir() else None)
    if directory is None:
        return None
    from hubsync.format.checkpoint import Checkpoint  # imports torch

    checkpoint = Checkpoint(directory, reader.run().table)
    checkpoint.check()
    return checkpoint


def with_merged(reader: ChainReader) -> list[Manifest]:
    """Manifests of the current chain, and after each version the merged deltas that end there."""
    manifests = reader.manifests()
    merged = reader.spans(manifests)
    rank = {"delta": 0, "merged": 1, "anchor": 2}
    return sorted([*manifests, *merged], key=lambda m: (m.version, rank[m.kind], -m.parent.version if m.parent else 0))
