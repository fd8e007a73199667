"""Requirements on vLLM and on the configuration of a server, without starting one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hubsync.apply.session import Session
from hubsync.errors import ConfigError, ReplicaUnsuitable
from vllm_plugin import compat, guards
from vllm_plugin.settings import read_settings


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
    guards.guard_forward(subject, lambda: calls.append("guard"))
    assert subject.model_runner.execute_model("step", extra=1) == "output"
    assert calls == ["guard", ("step", 1)]


class Recorder:
    """Stands for the session: records what it is told."""

    working = False

    def __init__(self) -> None:
        self.log: list[str] = []
        self.away = False

    def weights_away(self, reason: str) -> None:
        if not self.away:
            self.log.append(reason)
        self.away = True

    def weights_back(self) -> None:
        if self.away:
            self.log.append("back")
        self.away = False

    weights_changing = Session.weights_changing
    _away = property(lambda self: self.away or None)

    def told(self) -> list[str]:
        log, self.log = self.log, []
        return log


def test_the_session_is_told_of_everything_that_vllm_does_to_weights() -> None:
    session, subject = Recorder(), worker()
    subject.sleep = lambda level=1: session.log.append(f"sleep {level}")
    subject.wake_up = lambda tags=None: session.log.append("wake")
    subject.load_model = subject.reset_weights = lambda: session.log.append("zero")
    subject.reload_weights = lambda weights_path=None: session.log.append("load")
    subject.model_runner.get_model().load_weights = lambda weights: session.log.append("load")
    for _ in range(2):  # the second time adds nothing
        guards.guard_weights(subject, session)  # type: ignore[arg-type]
    subject.sleep(0)
    assert session.told() == ["sleep 0"], "scheduling only"
    subject.sleep(level=2)
    subject.wake_up(tags=["kv_cache"])
    assert session.told() == ["the server slept at level 2", "sleep 2", "wake"]
    subject.wake_up(["weights"])
    subject.wake_up()
    assert session.told() == ["wake", "back", "the server has woken up", "wake", "back"]
    subject.reload_weights(weights_path="elsewhere")
    assert session.told() == ["the server has reloaded its weights", "load", "back"]
    subject.load_model()
    assert session.told() == ["the server has loaded its model again", "zero", "back"]
    subject.reset_weights()
    assert session.told() == ["the server has set its weights to zero", "zero", "back"]
    model = subject.model_runner.get_model()
    model.load_weights([])
    assert session.told() == ["something has called the model's load_weights", "load", "back"]
    session.working = True
    model.load_weights([])
    assert session.told() == ["load"], "hubsync itself"


def test_weights_are_away_during_an_update_by_another_backend() -> None:
    session, subject = Recorder(), worker()

    def update(chunk: object) -> None:
        session.log.append("update")
        if chunk is None:
            subject._weight_update_active = False
            raise ValueError("as vLLM does")

    subject.start_weight_update = lambda: setattr(subject, "_weight_update_active", True)
    subject.update_weights = update
    subject.finish_weight_update = lambda: setattr(subject, "_weight_update_active", False)
    guards.guard_weights(subject, session)  # type: ignore[arg-type]
    away = "another backend has updated the weights of this server"
    subject.start_weight_update()
    subject.update_weights({})
    subject.finish_weight_update()
    assert session.told() == [away, "update", "back"]
    subject.start_weight_update()
    with pytest.raises(ValueError, match="as vLLM does"):
        subject.update_weights(None)
    assert session.told() == [away, "update", "back"]


def test_updates_through_hubsyncs_backend_are_its_own() -> None:
    session, subject = Recorder(), worker(weight_transfer_config=SimpleNamespace(backend="hubsync"))
    subject.update_weights = lambda chunk: session.log.append("update")
    guards.guard_weights(subject, session)  # type: ignore[arg-type]
    subject.update_weights({})
    assert session.told() == ["update"]


@pytest.mark.parametrize(("value", "share"), [("0", 0.0), ("0.5", 0.5), (1, 1.0), (None, 0.02)])
def test_the_share_of_idle_verification(value: Any, share: float) -> None:
    pinned = {} if value is None else {"hubsync": {"verify_share": value}}
    settings = read_settings(SimpleNamespace(additional_config=pinned))
    assert (settings.verify_share, settings.ignored) == (share, ())


@pytest.mark.parametrize("wrong", ["2", "-1", "nan", "much", ""])
def test_a_mistyped_share_is_replaced_by_the_default(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBSYNC_VERIFY_SHARE", wrong)
    settings = read_settings(SimpleNamespace(additional_config={}))
    assert settings.verify_share == 0.02
    assert "HUBSYNC_VERIFY_SHARE) must be a number from 0 to 1" in settings.ignored[0]


def test_a_draft_of_another_checkpoint_is_not_followed() -> None:
    model, draft = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    subject = worker()
    subject.model_runner = SimpleNamespace(get_model=lambda: model, get_draft_model=lambda: draft)
    for name, expected in (("no/such-model", (model, draft)), ("another/draft", (model,))):
        config = SimpleNamespace(draft_model_config=SimpleNamespace(model=name))
        subject.vllm_config.speculative_config = config
        assert compat._models(subject) == expected


def test_a_draft_that_grows_stale_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBSYNC_BUCKET", "/data/run")
    warnings: list[str] = []
    monkeypatch.setattr(compat.logger, "warning", lambda text, *values: warnings.append(text % values))
    compat._warn_of_draft.cache_clear()
    subject = worker(speculative_config=SimpleNamespace(draft_model_config=SimpleNamespace(model="another/draft")))
    subject.model_runner.get_draft_model = lambda: torch.nn.Linear(1, 1)
    for _ in range(2):
        assert len(compat.model_host_of(subject).models) == 1
    assert [text.partition(" is no part")[0] for text in warnings] == ["hubsync: the draft model another/draft"]


class Multimodal(torch.nn.Module):
    """Stands for a multimodal model of vLLM, with its method."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.language_model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

    def get_language_model(self) -> torch.nn.Module:
        return self.language_model


def test_towers_and_layers_of_a_draft_may_be_left_out_by_a_run() -> None:
    model, draft = Multimodal(), torch.nn.ModuleDict({"mtp": torch.nn.Linear(1, 1)})
    draft["language_model"] = model.language_model
    assert compat._parts([torch.nn.Linear(1, 1)]) == []
    assert compat._parts([model, draft]) == [
        frozenset({"tower.weight", "tower.bias"}),
        frozenset({"mtp.weight", "mtp.bias"}),
    ]
