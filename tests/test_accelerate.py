"""A TRL trainer of several processes, and a real server that follows it.

torchrun starts them: `accelerate launch` needs MPI for several processes on CPUs. Inside, accelerate rules.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.replica.server import VLLMServer
from hubsync.replica.sync import Replica

from .models import save_checkpoint, save_tokenizer

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[1]


def test_two_ranks_train_with_trl_and_the_server_follows_both(start_server: Callable[..., str], tmp_path: Path) -> None:
    base, bucket, output = save_checkpoint("qwen3_tied", tmp_path / "base"), tmp_path / "run", tmp_path / "out"
    save_tokenizer(base)
    output.mkdir()
    url = start_server(base, bucket=str(bucket), arguments=["--logprobs-mode", "processed_logprobs"])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "tests/grpo_ranks.py", str(base), url, str(bucket), str(output)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((output / f"{rank}.json").read_text()) for rank in range(2))
    reader = ChainReader(LocalBucket(str(bucket)), tmp_path / "cache")
    newest = reader.newest()
    assert first["digest"] == second["digest"] == newest.digest
    assert first["ranks"] == 2
    assert first["commits"] == first["matches"] == second["commits"] == newest.version > 0
    assert [[part.rank for part in manifest.parts] for manifest in reader.manifests()] == [[0, 1]] * newest.version
    Replica(VLLMServer(url)).wait_verified(newest)
