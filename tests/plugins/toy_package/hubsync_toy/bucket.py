"""Bucket backend for `toy://NAME`: the directory NAME in $TOY_ROOT."""

from __future__ import annotations

import os
from pathlib import Path

from hubsync.bucket import LocalBucket


class ToyBucket(LocalBucket):
    def __init__(self, address: str, *, create: bool, token: str | None, endpoint: str | None):
        super().__init__(Path(os.environ["TOY_ROOT"]) / address.removeprefix("toy://"), create=create)
        self.address = address
