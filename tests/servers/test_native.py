"""vLLM's own weight transfer calls alone: no worker extension, and two workers that must stay in step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm.distributed.weight_transfer.base import ModuleSource
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from hubsync import SyncConfig
from hubsync.demo.compare import greedy
from hubsync.errors import ConfigError
from hubsync.format.manifest import Position
from hubsync.integrations.vllm_trainer import HubsyncTrainerInitInfo, HubsyncTrainerWeightTransferEngine
from hubsync.replicas.vllm_http import VLLMServer
from tests.support.models import save_checkpoint, save_tokenizer
from tests.support.publisher import Publisher, small_steps
from tests.support.site import core_per_worker

pytestmark = pytest.mark.server

PROMPTS = ["the quick brown fox", "the lazy dog plus 17 makes " * 40]


class Native:
    """A run, and a server with the weight transfer backend, driven by vLLM's own calls."""

    def __init__(self, publisher: Publisher, url: str):
        self.publisher = publisher
        self.url = url

    def call(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/{path}", json=body or None, timeout=120)

    def update(self, position: Position) -> None:
        info = {"version": position.version, "digest": position.digest}
        for path, body in (
            ("start_weight_update", {}),
            ("update_weights", {"update_info": info}),
            ("finish_weight_update", {"weight_version": str(position.version)}),
        ):
            answer = self.call(path, **body)
            assert answer.is_success, answer.text
        assert VLLMServer(self.url).weight_version() == str(position.version)


def trained(base: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.fixture(scope="module")
def native(start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Native:
    root = tmp_path_factory.mktemp("native")
    base = save_checkpoint("qwen3_tied", root / "base")
    save_tokenizer(base)
    publisher = Publisher(root, base, names=[name for name, _ in trained(base).named_parameters()])
    url = start_server(
        base,
        environment={
            **core_per_worker(),
            "HUBSYNC_BUCKET": publisher.address,
            "HUBSYNC_CACHE": str(root / "cache"),
        },
        arguments=["--weight-transfer-config", '{"backend": "hubsync"}', "--tensor-parallel-size", "2"],
    )
    return Native(publisher, url)


def test_vllms_own_calls_apply_versions_forward_and_back(native: Native) -> None:
    before = greedy(native.url, PROMPTS)
    assert native.call("init_weight_transfer_engine", init_info={}).is_success
    native.update(native.publisher.publish(1, small_steps))
    after = greedy(native.url, PROMPTS)
    assert after != before
    native.update(native.publisher.publish(2, small_steps))  # other elements
    native.update(native.publisher.positions[1])
    assert greedy(native.url, PROMPTS) == after
    native.update(native.publisher.positions[0])
    assert greedy(native.url, PROMPTS) == before


def test_errors_are_raised_once_and_leave_the_workers_in_step(native: Native) -> None:
    digest = native.publisher.positions[0].digest
    for info in ({"version": 9, "digest": digest}, {"version": "1", "digest": digest}, {"url": "http://elsewhere"}):
        assert native.call("start_weight_update").is_success
        failed = native.call("update_weights", update_info=info)
        assert failed.status_code == 500, info
        assert not native.call("finish_weight_update", weight_version="9").is_success
    assert VLLMServer(native.url).weight_version() != "9"
    assert not native.call("finish_weight_update").is_success, "nothing was started"
    assert native.call("start_weight_update").is_success
    assert "nothing was staged" in native.call("finish_weight_update").text
    native.update(native.publisher.positions[1])
    native.update(native.publisher.positions[0])


def test_the_trainers_half_of_vllms_interface_publishes_and_commits(native: Native) -> None:
    model = trained(native.publisher.base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    transfer = WeightTransferTrainerFactory.trainer_init(
        HubsyncTrainerInitInfo(model, optimizer, SyncConfig(bucket=native.publisher.address), rank=0),
        client=HTTPVLLMWeightSyncClient(native.url),
    )
    assert isinstance(transfer, HubsyncTrainerWeightTransferEngine)
    transfer.send_weights()
    before = greedy(native.url, PROMPTS)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()

    transfer.send_weights()

    published = transfer.published
    assert published is not None
    assert published.changed > 0
    assert VLLMServer(native.url).weight_version() == str(published.version)
    assert greedy(native.url, PROMPTS) != before
    transfer.shutdown()
    with pytest.raises(ConfigError, match="no WeightSource"):
        WeightTransferTrainerFactory.trainer_init(
            HubsyncTrainerInitInfo(model, optimizer, SyncConfig(bucket=native.publisher.address), rank=0),
            client=HTTPVLLMWeightSyncClient(native.url),
            source=ModuleSource(model),
        )
