"""A TRL trainer of several processes under `accelerate launch`, and a real server that follows it.

The policy is a mixture of experts: fused in the trainer, and cut over its processes by experts under FSDP2.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hubsync.bucket import LocalBucket
from hubsync.chain import ChainReader
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer
from tests.support.launched import launch
from tests.support.models import save_checkpoint, save_tokenizer

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def followed(start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Path]:
    """A checkpoint, a server of it, and the bucket of the run that the server follows. Each training continues it."""
    directory = tmp_path_factory.mktemp("run")
    base, bucket = save_checkpoint("qwen3_moe", directory / "base"), directory / "bucket"
    save_tokenizer(base)
    return base, start_server(base, bucket=str(bucket), arguments=["--logprobs-mode", "processed_logprobs"]), bucket


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("ddp", marks=pytest.mark.long),
        "fsdp2",
        *(pytest.param(how, marks=pytest.mark.extras) for how in ("zero1", "zero2", "zero3")),
    ],
)
def test_two_ranks_train_with_trl_and_the_server_follows_both(
    how: str, followed: tuple[Path, str, Path], tmp_path: Path
) -> None:
    base, url, bucket = followed
    reader = ChainReader(LocalBucket(str(bucket), create=True), tmp_path / "cache")
    before = len(list(reader.manifests())) if (bucket / "run.json").exists() else 0
    launch(how, "tests.support.grpo_ranks", base, url, bucket, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    newest = reader.newest()
    assert first["digest"] == second["digest"] == newest.digest
    assert first["ranks"] == 2
    assert first["sharded"] == second["sharded"] == (how in ("fsdp2", "zero3"))
    made = list(reader.manifests())[before:]
    assert first["commits"] == first["matches"] == second["commits"] == len(made) > 1
    deltas = [manifest for manifest in made if manifest.kind == "delta"]
    assert deltas
    assert all({part.rank for part in delta.parts} == {0, 1} for delta in deltas), "each uploads what it owns"
    Replica(VLLMServer(url)).wait_verified(newest)
    of_first, of_second = first["logged"][0], second["logged"][0]  # of step 1
    delta = next(manifest for manifest in deltas if manifest.step == 1)
    assert of_first["weight_sync/payload_bytes"] == sum(part.size for part in delta.parts)
    assert of_first["weight_sync/rank_payload_bytes_max"] == max(part.size for part in delta.parts)
    for cost in ("detect_s", "encode_s"):
        slowest = max(row[f"weight_sync/{cost}"] for row in (of_first, of_second))
        assert of_first[f"weight_sync/rank_{cost}_max"] == slowest
    assert of_first["weight_sync/rank_upload_s_max"] > 0
