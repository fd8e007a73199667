"""Servers behind a proxy that demands a token: everything that talks to a server sends it, and errors say how.

The proxy is real, the servers behind it are stand-ins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.cli.main import main
from hubsync.errors import ConfigError, ReplicaUnsuitable
from hubsync.lifecycle.rollouts.sampler import Sample, Sampler
from hubsync.replicas.deployment import Deployment
from hubsync.replicas.vllm_http import VLLMServer
from tests.replicas.test_replica import NEXT
from tests.support.proxy import TOKEN, TokenProxy
from tests.support.standin import StandIn
from tests.support.standins import StandIn as SampledStandIn
from tests.support.tiny import Tiny


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as standin:
        yield standin


@pytest.fixture
def proxy(server: StandIn) -> Iterator[TokenProxy]:
    with TokenProxy(server.url) as proxy:
        yield proxy


@pytest.fixture
def by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", TOKEN)


def test_a_trainer_sends_the_key_of_its_config(proxy: TokenProxy, server: StandIn, tmp_path: Path) -> None:
    model = Tiny()
    config = SyncConfig(bucket=str(tmp_path / "run"), servers=[f"{proxy.url}/"], api_key=TOKEN, base_model="tiny")
    with DeltaWeightTransferEngine(model, None, config) as engine:
        server.base = engine.position
        server.stop()
        server.start()
        with torch.no_grad():
            model.scale.mul_(2.0)
        assert engine.sync(1).commits[0].position == engine.position == server.position
    assert proxy.refused == 0


@pytest.mark.usefixtures("by_environment")
def test_a_deployment_sends_the_key_of_the_environment(proxy: TokenProxy, server: StandIn) -> None:
    deployment = Deployment([proxy.url])
    deployment.hotload(NEXT).raise_for_quorum()
    deployment.close()
    assert server.position == NEXT
    assert proxy.refused == 0


@pytest.mark.usefixtures("by_environment")
def test_a_given_key_goes_before_that_of_the_environment(proxy: TokenProxy) -> None:
    with pytest.raises(ReplicaUnsuitable, match="another API key"):
        VLLMServer(proxy.url, "other").version()


@pytest.mark.usefixtures("by_environment")
def test_user_and_password_of_the_url_go_first(server: StandIn) -> None:
    with TokenProxy(server.url, "Basic bWU6cEBzcw==") as proxy:  # me:p@ss
        client = VLLMServer(proxy.url.replace("://", "://me:p%40ss@"))
        assert client.version()
        assert client.url == proxy.url


@pytest.mark.parametrize("key", [None, "wrong"])
def test_the_error_names_settings_that_work(
    proxy: TokenProxy, key: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each remedy of the message is tried."""
    with pytest.raises(ReplicaUnsuitable) as refused:
        VLLMServer(proxy.url, key).version()
    assert ("none was given" in str(refused.value)) == (key is None)
    assert all(
        remedy in str(refused.value) for remedy in ("SyncConfig(api_key=", "hubsync follow --api-key", "VLLM_API_KEY")
    )
    follow = ["follow", "--once", "--server", proxy.url, "--bucket", str(tmp_path)]
    before = len(proxy.passed)
    main([*follow, "--api-key", TOKEN])
    monkeypatch.setenv("VLLM_API_KEY", TOKEN)
    assert VLLMServer(proxy.url).version()
    assert len(proxy.passed) > before


@pytest.mark.parametrize("key", ["line\nbreak", "café"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="printable ASCII") as refused:
        VLLMServer("http://host", key)
    assert key not in str(refused.value)
    assert VLLMServer("http://host", "key\n").access.headers == {"Authorization": "Bearer key"}


def test_a_sampler_sends_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    async def samples(url: str, api_key: str | None) -> list[Sample]:
        async with Sampler([url], api_key=api_key, poll_s=0.01) as sampler:
            return [sample async for sample in sampler.sample([[1]], 1, seed=1)]

    standin = SampledStandIn()
    with TokenProxy(standin.url) as proxy:
        assert len(asyncio.run(samples(proxy.url, TOKEN))) == 1
        monkeypatch.setenv("VLLM_API_KEY", TOKEN)
        assert len(asyncio.run(samples(proxy.url, None))) == 1
        assert proxy.refused == 0
    standin.kill()
