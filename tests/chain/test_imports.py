"""Reading, writing and cleaning a run needs neither torch nor numba, so commands start quickly."""

from __future__ import annotations

import subprocess
import sys


def test_a_chain_is_imported_without_torch_and_numba() -> None:
    code = """
import sys
import hubsync.bucket, hubsync.bucket.hub
import hubsync.chain, hubsync.chain.reader, hubsync.chain.writer, hubsync.chain.retention, hubsync.chain.serving
from hubsync.chain import ChainReader, ChainWriter, Layout, Plan, Step, VersionInfo
sys.exit(str({"torch", "numba"} & sys.modules.keys() or ""))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""
