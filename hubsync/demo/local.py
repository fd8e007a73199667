"""Local Hub for the demo."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hubsync.localhub import LocalHub


@contextmanager
def local_bucket(root: Path) -> Iterator[str]:
    """Serve a Hub from the directory `root`, and yield the address of a new run in it.

    Sets the Hub's environment variables for this process and its children. Enter it before anything imports
    `huggingface_hub`, which reads some of them at import. hf_xet caches by URL what it has uploaded, and an earlier Hub
    may have had the same URL, so the cache is kept in `root`.
    """
    with LocalHub(root) as hub:
        os.environ.update(HF_ENDPOINT=hub.url, HF_TOKEN="hf_local", HF_XET_CACHE=str(root / "xet-cache"))
        yield f"hf://buckets/me/demo/run-{time.strftime('%Y%m%d-%H%M%S')}"
