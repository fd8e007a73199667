"""An anchor of a base model in a Hub repository is copied there, not uploaded. Real clients, local Hub."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import save_file

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket.base import Download, Upload
from hubsync.bucket.hub import HubBucket
from hubsync.chain import ChainReader
from hubsync.chain.replay import replay
from hubsync.format.manifest import Manifest
from hubsync.localhub import LocalHub
from hubsync.publish import engine as engine_module
from tests.support.faults import FaultyBucket
from tests.support.fixtures_hub import TOKEN

REVISION = "c0ffee" * 6 + "c0ff"


class CountingBucket(FaultyBucket):
    """Counts the bytes given to the client for upload."""

    uploaded = 0

    def put(self, uploads: Sequence[Upload]) -> None:
        self.uploaded += sum(upload.size for upload in uploads)
        super().put(uploads)


@pytest.fixture
def bucket(local_hub: LocalHub, hub_bucket: HubBucket, monkeypatch: pytest.MonkeyPatch) -> CountingBucket:
    bucket = CountingBucket(hub_bucket)
    monkeypatch.setattr(engine_module, "open_bucket", lambda *args, **options: bucket)
    return bucket


@pytest.fixture
def repo() -> str:
    return f"me/{secrets.token_hex(8)}"


def publish_base(hub: LocalHub, repo: str, tensors: dict[str, torch.Tensor]) -> Path:
    """Create a model repository on the Hub and its copy in the local cache. Returns the weights' file in the cache."""
    snapshot = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "snapshots", REVISION)
    snapshot.mkdir(parents=True)
    file = snapshot / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    api = HfApi(hub.url, token=TOKEN)
    api.create_bucket(f"{repo}-files", private=True)
    api.batch_bucket_files(f"{repo}-files", add=[(file, file.name)])
    hub.add_model(repo, f"{repo}-files", {file.name: hashlib.sha256(file.read_bytes()).hexdigest()})
    return file


def view_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().bfloat16() for name, tensor in model.named_parameters()}


def anchor(model: torch.nn.Module, repo: str) -> Manifest:
    config = SyncConfig(bucket="bucket", base_model=repo, base_revision=REVISION)
    with DeltaWeightTransferEngine(model, None, config) as engine:
        return engine.anchor()


def assert_it_is_version_0(bucket: CountingBucket, model: torch.nn.Module, cache: Path) -> None:
    reader = ChainReader(bucket, cache)
    plan = reader.plan(None)
    assert plan.anchor is not None
    view = replay(reader, plan)
    assert view.position.version == 0
    assert all(torch.equal(view.tensors[name], tensor) for name, tensor in view_of(model).items())


def test_the_hub_copies_a_base_that_equals_the_view_bit_for_bit(
    local_hub: LocalHub, bucket: CountingBucket, repo: str, tmp_path: Path
) -> None:
    model = torch.nn.Linear(512, 1024)
    base = publish_base(local_hub, repo, view_of(model))
    manifest = anchor(model, repo)
    assert bucket.uploaded == 0
    assert manifest.nbytes == base.stat().st_size
    assert_it_is_version_0(bucket, model, tmp_path / "cache")


@pytest.mark.parametrize("wrong", ["another dtype", "one tensor more", "not on the Hub", "the copy fails"])
def test_a_base_that_cannot_be_copied_is_uploaded(
    local_hub: LocalHub, bucket: CountingBucket, repo: str, tmp_path: Path, wrong: str
) -> None:
    model = torch.nn.Linear(512, 1024)
    tensors = view_of(model)
    if wrong == "another dtype":
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if wrong == "one tensor more":
        tensors["more"] = torch.zeros(8)
    base = publish_base(local_hub, repo, tensors)
    if wrong == "not on the Hub":
        local_hub.fail("/paths-info/" + REVISION, status=404)
    if wrong == "the copy fails":
        bucket.fail("copy_in")
    anchor(model, repo)
    assert bucket.uploaded >= min(base.stat().st_size, 1 << 20)
    assert_it_is_version_0(bucket, model, tmp_path / "cache")


def test_a_copy_holds_the_bytes_of_the_repository_or_fails_as_a_whole(
    local_hub: LocalHub, hub_bucket: HubBucket, repo: str, tmp_path: Path
) -> None:
    base = publish_base(local_hub, repo, {"weight": torch.randn(256, 256)})
    local_hub.reset()
    copied = hub_bucket.copy_in(repo, REVISION, {base.name: "there/model.safetensors"})
    assert local_hub.api_calls() <= 3
    assert copied is not None
    stated = copied["there/model.safetensors"]
    hub_bucket.fetch([Download("there/model.safetensors", stated.size, stated.sha256, tmp_path / "file")])
    assert (tmp_path / "file").read_bytes() == base.read_bytes()
    assert hub_bucket.copy_in(repo, REVISION, {base.name: "a", "other.safetensors": "b"}) is None
    assert hub_bucket.copy_in("me/nothing", REVISION, {base.name: "a"}) is None
    assert hub_bucket.copy_in("/not a name", REVISION, {base.name: "a"}) is None
    assert not hub_bucket.stat(["a", "b"])
