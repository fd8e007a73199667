"""verl's checkpoint engine with stand-ins for `ray` and verl's interface, which `make test` does not install.

`tests/servers/test_verl.py` runs the real packages with real ranks and a real server.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader
from hubsync.errors import ConfigError


class _Registry:
    engines: ClassVar[dict[str, type]] = {}

    @staticmethod
    def register(backend: str) -> Callable[[type], type]:
        return lambda cls: _Registry.engines.setdefault(backend, cls)


class _Manager:
    def __init__(self, config: Any, actor_wg: Any, replicas: list[Any]):
        self.backend, self.actor_wg, self.replicas = config.backend, actor_wg, replicas


@pytest.fixture
def verl(monkeypatch: pytest.MonkeyPatch) -> Any:
    base = {
        "CheckpointEngine": object,
        "CheckpointEngineManager": _Manager,
        "CheckpointEngineRegistry": _Registry,
    }
    run = {"auto_await": lambda method: lambda *args, **kwargs: asyncio.run(method(*args, **kwargs))}
    for name, content in (
        ("ray", {"get": lambda calls: calls}),
        ("verl", {}),
        ("verl.checkpoint_engine", {}),
        ("verl.checkpoint_engine.base", base),
        ("verl.utils", {}),
        ("verl.utils.ray_utils", run),
    ):
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "hubsync.integrations.verl", raising=False)
    yield import_module("hubsync.integrations.verl")
    sys.modules.pop("hubsync.integrations.verl", None)


class _Actors:
    """One actor, called as verl's worker calls its engine in each mode."""

    world_size = 1

    def __init__(self, engine: Any, training: Any):
        self.engine, self.training = engine, training
        self.named: list[list[str]] = []

    def update_weights(self, global_steps: int | None, mode: str) -> list[Any]:
        assert mode == "delta_sharded"
        sending = self.engine.send_weights(self.training, global_steps=global_steps)
        with ThreadPoolExecutor(1) as process:  # an actor has an event loop of its own
            return [process.submit(asyncio.run, sending).result()]

    def execute_checkpoint_engine(self, method: list[str], servers: list[list[str]]) -> list[None]:
        self.named += servers
        return [None]


def test_each_update_publishes_what_changed_and_gathers_nothing(verl: Any, tmp_path: Path) -> None:
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = verl.HubsyncCheckpointEngine(bucket=str(tmp_path / "run"))
    actors = _Actors(engine, SimpleNamespace(module=model, optimizer=optimizer))
    manager = verl.HubsyncCheckpointManager(SimpleNamespace(backend="hubsync"), actors, [])

    assert manager.update_weights(global_steps=0)["weight_sync/version"] == 0
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    metrics = manager.update_weights(global_steps=1)

    newest = ChainReader(open_bucket(str(tmp_path / "run")), tmp_path / "cache").newest()
    assert metrics["weight_sync/version"] == newest.version == 1
    assert metrics["weight_sync/changed_fraction"] > 0
    engine.close()


def test_the_manager_names_the_replicas_when_they_change(verl: Any) -> None:
    actors = _Actors(None, None)
    actors.update_weights = lambda global_steps, mode: [{}]  # type: ignore[method-assign]
    replica = SimpleNamespace(server_address="10.0.0.7:8000")
    manager = verl.HubsyncCheckpointManager(SimpleNamespace(backend="hubsync"), actors, [replica])
    manager.update_weights(global_steps=0)
    manager.update_weights(global_steps=1)
    manager.replicas = [replica, SimpleNamespace(server_address="10.0.0.8:8000")]
    manager.update_weights(global_steps=2)
    assert actors.named == [["http://10.0.0.7:8000"], ["http://10.0.0.7:8000", "http://10.0.0.8:8000"]]


def test_what_cannot_work_is_refused_with_the_setting_to_change(verl: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="backend=hubsync, not nccl"):
        verl.HubsyncCheckpointManager(SimpleNamespace(backend="nccl"), None, []).update_weights()
    engine = verl.HubsyncCheckpointEngine(bucket=str(tmp_path))
    with pytest.raises(ConfigError, match="checkpoint_manager_class"):
        asyncio.run(engine.send_weights(iter([("weight", torch.zeros(2))])))
