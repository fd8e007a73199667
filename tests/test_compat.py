"""What hubsync asks of vLLM and of the configuration of a server, without starting one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hubsync.errors import ConfigError, ReplicaRefused, ReplicaUnsuitable
from vllm_plugin import compat


def worker(**changes: Any) -> SimpleNamespace:
    """The few attributes of a vLLM worker that are read, as a server without options has them."""
    settings: dict[str, Any] = {
        "parallel_config": SimpleNamespace(
            world_size=1, tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1
        ),
        "quant_config": None,
        "lora_config": None,
        "additional_config": {},
        "model_config": SimpleNamespace(model="no/such-model", revision=None, quantization=None),
        **changes,
    }
    model = torch.nn.Linear(1, 1)
    runner = SimpleNamespace(get_model=lambda: model)
    return SimpleNamespace(vllm_config=SimpleNamespace(**settings), model_runner=runner, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HUBSYNC_BUCKET", raising=False)
    monkeypatch.delenv("HUBSYNC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.32.0")


def test_importing_the_package_loads_neither_vllm_nor_torch() -> None:
    code = "import sys, vllm_plugin; vllm_plugin.register(); vllm_plugin.register(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"vllm", "torch", "numba", "hubsync"} & set(loaded)


@pytest.mark.parametrize("version", ["0.27.0", "0.32.0+cpu", "0.33.1", "1.0", "0.1.dev12345+gabc"])
def test_supported_versions(version: str) -> None:
    compat.require_supported_version(version)


@pytest.mark.parametrize("version", ["0.8.5", "0.26.4", "0.26.0rc1"])
def test_older_versions_are_refused_with_the_range(version: str) -> None:
    with pytest.raises(ReplicaUnsuitable, match=r"needs 0\.27 or newer"):
        compat.require_supported_version(version)


def test_the_bucket_must_be_pinned() -> None:
    with pytest.raises(ConfigError, match=r"HUBSYNC_BUCKET=.*--additional-config"):
        compat.host_of(worker())


def test_the_bucket_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HUBSYNC_BUCKET", "/data/run")
    host = compat.host_of(worker())
    assert (host.bucket, host.cache, host.checkpoint) == ("/data/run", tmp_path / "hubsync", None)


def test_the_command_line_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBSYNC_BUCKET", "/data/other")
    pinned = {"hubsync": {"bucket": "hf://buckets/me/runs/a", "cache": "/cache"}}
    host = compat.host_of(worker(additional_config=pinned))
    assert (host.bucket, host.cache) == ("hf://buckets/me/runs/a", Path("/cache"))


@pytest.mark.parametrize("value", ["/data/run", {"buket": "/data/run"}, None])
def test_a_mistyped_setting_is_named(value: object) -> None:
    with pytest.raises(ConfigError, match="hubsync must be an object with bucket and cache"):
        compat.host_of(worker(additional_config={"hubsync": value}))


def parallel(**sizes: int) -> SimpleNamespace:
    defaults = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1, "world_size": 1}
    return SimpleNamespace(**{**defaults, **sizes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parallel_config": parallel(tensor_parallel_size=2, world_size=2)}, "2 workers .*tensor parallel 2"),
        ({"parallel_config": parallel(pipeline_parallel_size=4, world_size=4)}, "4 workers"),
        ({"parallel_config": parallel(data_parallel_size=3)}, "3 workers"),
        (
            {
                "quant_config": object(),
                "model_config": SimpleNamespace(model="m", revision=None, quantization="fp8"),
            },
            r"quantises its weights \(fp8\)",
        ),
        ({"lora_config": object()}, "LoRA"),
    ],
)
def test_what_cannot_be_exact_yet_is_refused(changes: dict, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBSYNC_BUCKET", "/data/run")
    with pytest.raises(ReplicaRefused, match=reason):
        compat.host_of(worker(**changes))


def test_the_checkpoint_that_was_loaded_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HUBSYNC_BUCKET", "/data/run")
    model = SimpleNamespace(model=str(tmp_path), revision=None, quantization=None)
    assert compat.host_of(worker(model_config=model)).checkpoint is None
    (tmp_path / "model.safetensors").touch()
    assert compat.host_of(worker(model_config=model)).checkpoint == tmp_path


def test_the_guard_runs_before_every_forward_pass() -> None:
    calls: list[object] = []
    subject = worker()
    subject.model_runner.execute_model = lambda step, extra=None: calls.append((step, extra)) or "output"
    compat.guard_forward(subject, lambda: calls.append("guard"))
    assert subject.model_runner.execute_model("step", extra=1) == "output"
    assert calls == ["guard", ("step", 1)]
