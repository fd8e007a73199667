"""Requirements on vLLM and on the configuration of a server, without starting one."""

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
    """The attributes of a vLLM worker that hubsync reads, as in a server without options."""
    settings: dict[str, Any] = {
        "parallel_config": SimpleNamespace(),
        "cache_config": SimpleNamespace(),
        "quant_config": None,
        "lora_config": None,
        "speculative_config": None,
        "additional_config": {},
        "model_config": SimpleNamespace(model="no/such-model", revision=None, quantization=None),
        **changes,
    }
    model = torch.nn.Linear(1, 1)
    runner = SimpleNamespace(get_model=lambda: model)
    return SimpleNamespace(vllm_config=SimpleNamespace(**settings), model_runner=runner, device=torch.device("cpu"))


@pytest.mark.parametrize("wrong", ["soon", "0", "-5", "nan", "inf", [], ""])
def test_a_mistyped_head_age_is_refused(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = {"hubsync": {"bucket": "/runs/a", "max_head_age": wrong}}
    with pytest.raises(ConfigError, match="HUBSYNC_MAX_HEAD_AGE"):
        compat.model_host_of(worker(additional_config=pinned))
    monkeypatch.setenv("HUBSYNC_BUCKET", "/runs/a")
    monkeypatch.setenv("HUBSYNC_MAX_HEAD_AGE", "90")
    assert compat.model_host_of(worker()).source.max_head_age == 90.0


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HUBSYNC_BUCKET", raising=False)
    monkeypatch.delenv("HUBSYNC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.32.0")


def test_importing_the_package_imports_neither_vllm_nor_torch() -> None:
    code = "import sys, vllm_plugin; vllm_plugin.register(); vllm_plugin.register(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"vllm", "torch", "numba", "hubsync"} & set(loaded)


@pytest.mark.parametrize("version", ["0.26.1", "0.27.0", "0.32.0+cpu", "0.33.1", "1.0", "0.1.dev12345+gabc"])
def test_supported_versions(version: str) -> None:
    compat.require_supported_version(version)


def test_a_version_newer_than_the_tested_ones_is_used_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(compat.logger, "warning", lambda text, *values: warnings.append(text % values))
    compat._warn_of_untested.cache_clear()
    for version in ("0.32.0", "0.34.1", "0.34.1"):
        compat.require_supported_version(version)
    assert [text.partition("). ")[0] for text in warnings] == [
        "hubsync: vLLM 0.34.1 is newer than the newest tested one (0.32"
    ]


@pytest.mark.parametrize("version", ["0.8.5", "0.25.4", "0.25.0rc1"])
def test_older_versions_are_refused_with_the_supported_range(version: str) -> None:
    with pytest.raises(ReplicaUnsuitable, match=r"needs 0\.26 or newer"):
        compat.require_supported_version(version)


def test_the_bucket_must_be_pinned() -> None:
    with pytest.raises(ConfigError, match=r"HUBSYNC_BUCKET=.*--additional-config"):
        compat.model_host_of(worker())


def test_the_bucket_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HUBSYNC_BUCKET", "/data/run")
    host = compat.model_host_of(worker())
    assert (host.source.bucket, host.source.cache, host.checkpoint) == ("/data/run", tmp_path / "hubsync", None)


def test_the_command_line_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBSYNC_BUCKET", "/data/other")
    pinned = {"hubsync": {"bucket": "hf://buckets/me/runs/a", "cache": "/cache"}}
    host = compat.model_host_of(worker(additional_config=pinned))
    assert (host.source.bucket, host.source.cache) == ("hf://buckets/me/runs/a", Path("/cache"))


@pytest.mark.parametrize("value", ["/data/run", {"buket": "/data/run"}, None])
def test_a_mistyped_setting_is_named(value: object) -> None:
    with pytest.raises(ConfigError, match="hubsync must be an object with some of bucket, cache, "):
        compat.model_host_of(worker(additional_config={"hubsync": value}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parallel_config": SimpleNamespace(enable_eplb=True)}, "moves experts between workers"),
        ({"parallel_config": SimpleNamespace(enable_elastic_ep=True)}, "moves experts between workers"),
        ({"offload_config": SimpleNamespace(uva=SimpleNamespace(cpu_offload_gb=1))}, "keeps weights in host memory"),
        ({"cache_config": SimpleNamespace(cpu_offload_gb=1)}, "keeps weights in host memory"),
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
def test_unsupported_configurations_are_refused(changes: dict, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBSYNC_BUCKET", "/data/run")
    with pytest.raises(ReplicaRefused, match=reason):
        compat.model_host_of(worker(**changes))


def test_the_checkpoint_that_was_loaded_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HUBSYNC_BUCKET", "/data/run")
    model = SimpleNamespace(model=str(tmp_path), revision=None, quantization=None)
    assert compat.model_host_of(worker(model_config=model)).checkpoint is None
    (tmp_path / "model.safetensors").touch()
    assert compat.model_host_of(worker(model_config=model)).checkpoint == tmp_path


def test_the_guard_runs_before_every_forward_pass() -> None:
    calls: list[object] = []
    subject = worker()
    subject.model_runner.execute_model = lambda step, extra=None: calls.append((step, extra)) or "output"
    compat.guard_forward(subject, lambda: calls.append("guard"))
    assert subject.model_runner.execute_model("step", extra=1) == "output"
    assert calls == ["guard", ("step", 1)]


def test_sleeping_and_reloading_report_lost_weights() -> None:
    lost: list[str] = []
    subject = SimpleNamespace(sleep=lambda level=1: f"slept {level}", reload_weights=lambda: "reloaded")
    compat.guard_weights(subject, lost.append)
    assert (subject.sleep(), lost) == ("slept 1", [])
    assert subject.sleep(level=2) == "slept 2"
    assert subject.reload_weights() == "reloaded"
    assert lost == ["the server slept at level 2, which discards weights", "the server has reloaded its weights"]


def test_a_draft_of_another_checkpoint_is_not_followed() -> None:
    model, draft = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    subject = worker()
    subject.model_runner = SimpleNamespace(get_model=lambda: model, get_draft_model=lambda: draft)
    for name, expected in (("no/such-model", (model, draft)), ("another/draft", (model,))):
        config = SimpleNamespace(draft_model_config=SimpleNamespace(model=name))
        subject.vllm_config.speculative_config = config
        assert compat._models(subject) == expected
