"""Real vLLM servers: two for the whole session, and those that a module starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader
from hubsync.demo.serving import ServerProcess
from hubsync.localhub import LocalHub
from hubsync.publish.config import SyncConfig
from hubsync.publish.engine import DeltaWeightTransferEngine
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer

from .fixtures_hub import TOKEN
from .on_gpu import SERVER_ARGUMENTS
from .site import SCALE_OUT, Site, make_site
from .warm import WarmServerProcess

# How long a commit window may stay open. Of `served`: long enough for the next client to come first on a busy machine.
# Of `site`, where tests wait for the watchdog: as short as a commit on a busy machine allows.
WINDOW_TIMEOUT_S = 60.0
SITE_WINDOW_TIMEOUT_S = 2.0


@dataclass
class Served:
    """A policy in training, and the server that follows it. Each test continues where the previous one stopped."""

    base: Path
    address: str
    url: str
    model: torch.nn.Module
    engine: DeltaWeightTransferEngine
    environment: dict[str, str]

    @property
    def server(self) -> VLLMServer:
        return VLLMServer(self.url)

    @property
    def replica(self) -> Replica:
        """A new client of the server."""
        return Replica(self.server)

    def reader(self, cache: Path) -> ChainReader:
        return ChainReader(open_bucket(self.address), cache)

    def train(self, lr: float = 1e-3) -> None:
        """Add noise to 5 % of the weights."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                chosen = torch.rand_like(parameter) < 0.05
                parameter.add_(torch.randn_like(parameter) * lr * chosen)


@pytest.fixture(scope="session")
def hub_environment(hub_process: LocalHub) -> Iterator[dict[str, str]]:
    """The local Hub is this process's default endpoint, as the real one is a user's."""
    environment = {"HF_ENDPOINT": hub_process.url, "HF_TOKEN": TOKEN}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    yield environment
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def start_server(
    hub_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., str]]:
    """Starts vLLM servers that end with the module: `start_server(model, bucket=..., ...) -> URL`.

    Each takes more than a gigabyte, so none outlives the tests that need it.
    """
    with _servers(tmp_path_factory) as start:
        yield start


@contextmanager
def _servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    processes: list[ServerProcess] = []

    def start(model: Path, **options: object) -> str:
        arguments: Any = options.pop("arguments", [])
        log = tmp_path_factory.mktemp("server") / "log"
        process = WarmServerProcess(model, log, arguments=[*arguments, *SERVER_ARGUMENTS], **options)  # type: ignore[arg-type]
        processes.append(process)
        process.wait_ready()
        return process.url

    try:
        yield start
    finally:
        for process in processes:
            process.stop()


@pytest.fixture(scope="session")
def served(hub_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny Qwen3 in fp32, published from its bf16 checkpoint, and a server of that checkpoint."""
    import transformers  # seconds, which tests without a server should not pay

    from .models import save_checkpoint, save_tokenizer

    base = save_checkpoint("qwen3_tied", tmp_path_factory.mktemp("base"))
    save_tokenizer(base)
    address = "hf://buckets/me/end-to-end/run"
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with _servers(tmp_path_factory) as start:
        url = start(
            base,
            bucket=address,
            environment={"HUBSYNC_WINDOW_TIMEOUT": str(WINDOW_TIMEOUT_S), "VLLM_PLUGINS": "hubsync"},
            arguments=["--enable-scale-out", "--weight-transfer-config", '{"backend": "hubsync"}'],
        )
        with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=address, servers=[url])) as engine:
            engine.sync()  # the server attaches
            yield Served(base, address, url, model, engine, hub_environment)


@pytest.fixture(scope="session")
def _shared_site(hub_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with _servers(tmp_path_factory) as start:
        yield make_site(
            tmp_path_factory.mktemp("site"),
            start,
            environment={"HUBSYNC_WINDOW_TIMEOUT": str(SITE_WINDOW_TIMEOUT_S), "VLLM_PLUGINS": "hubsync"},
            arguments=["--weight-transfer-config", '{"backend": "hubsync"}', *SCALE_OUT],
        )


@pytest.fixture
def site(_shared_site: Site) -> Site:
    """One run and one server for all tests that ask for it, brought to the newest version."""
    _shared_site.bring_to_newest()
    return _shared_site
