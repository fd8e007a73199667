"""TRL's family of trainers that generate through `VLLMGeneration`: all of them attach, synchronise and generate.

`StubServer` stands in for vLLM, which cannot start in seconds: it answers the requests of TRL's client with random
tokens. That weights arrive is shown with a real server, in test_trl_server.py.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from packaging.version import Version

from hubsync.errors import ConfigError
from hubsync.integrations import trl_checks
from hubsync.integrations.trl import HubSyncCallback
from hubsync.publish.config import SyncConfig
from hubsync.replicas.replica import Replica
from tests.support.async_toy import save_policy
from tests.support.proxy import TOKEN, TokenProxy

WORDS = 300  # tokens that the stub draws from

TEXTS = Dataset.from_dict({"prompt": [f"{i} plus 1" for i in range(16)]})
DIALOGUES = Dataset.from_list(
    [
        {"messages": [{"role": "user", "content": f"{i} plus 1"}, {"role": "assistant", "content": f"makes {i + 1}"}]}
        for i in range(16)
    ]
)
DEMONSTRATIONS = Dataset.from_list(
    [
        {"prompt": [{"role": "user", "content": f"{i} plus 1"}], "privileged_context": f"makes {i + 1}"}
        for i in range(16)
    ]
)


class StubServer(ThreadingHTTPServer):
    """The requests of TRL's client, and nothing else of vLLM. Counts generations."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.generations = 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: StubServer

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        info = {"vllm_config": {"model_config": {"logprobs_mode": "processed_logprobs"}}}
        self._answer({"/v1/models": {"data": [{"id": "tiny"}]}, "/server_info": info}.get(self.path.split("?")[0], {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.generations += 1
        self._answer({"choices": [_choice(prompt) for prompt in body["prompt"] for _ in range(body["n"])]})

    def _answer(self, document: dict[str, Any]) -> None:
        content = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _choice(prompt: list[int]) -> dict[str, Any]:
    ids = [random.randrange(3, WORDS) for _ in range(6)]
    names = [f"token_id:{token}" for token in ids]
    logprobs = {"tokens": names, "token_logprobs": [-5.7] * 6, "top_logprobs": [{name: -5.7} for name in names]}
    return {"prompt_token_ids": prompt, "token_ids": ids, "logprobs": logprobs}


@pytest.fixture(scope="module")
def stub() -> Iterator[StubServer]:
    with StubServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_policy(tmp_path_factory.mktemp("family")))


def settings(directory: Path, url: str, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(directory),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_completion_length": 8,
        "vllm_server_base_url": url,
        **more,
    }


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [random.random() for _ in completions]


def grpo(policy: str, common: dict[str, Any]) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    return GRPOTrainer(policy, reward, args=GRPOConfig(**common, num_generations=2), train_dataset=TEXTS)


def rloo(policy: str, common: dict[str, Any]) -> Any:
    from trl import RLOOConfig, RLOOTrainer

    return RLOOTrainer(policy, reward, args=RLOOConfig(**common, num_generations=2), train_dataset=TEXTS)


def gmpo(policy: str, common: dict[str, Any]) -> Any:
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    return GMPOTrainer(policy, reward, args=GMPOConfig(**common, num_generations=2), train_dataset=TEXTS)


def distillation(policy: str, common: dict[str, Any], teacher: str | None = None) -> Any:
    from trl import DistillationConfig, DistillationTrainer

    return DistillationTrainer(policy, teacher or policy, args=DistillationConfig(**common), train_dataset=TEXTS)


def gold(policy: str, common: dict[str, Any], teacher: str | None = None) -> Any:
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    args = GOLDConfig(**common, max_length=64, lmbda=1.0)
    return GOLDTrainer(
        policy, teacher or policy, args=args, train_dataset=DIALOGUES, processing_class=tokenizer(policy)
    )


def iw_opd(policy: str, common: dict[str, Any], teacher: str | None = None) -> Any:
    from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

    args = IWOPDConfig(**common, max_length=64, lmbda=1.0)
    return IWOPDTrainer(
        policy, teacher or policy, args=args, train_dataset=DIALOGUES, processing_class=tokenizer(policy)
    )


def sdft(policy: str, common: dict[str, Any]) -> Any:
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    return SDFTTrainer(policy, args=SDFTConfig(**common, num_generations=2), train_dataset=DEMONSTRATIONS)


def sdpo(policy: str, common: dict[str, Any]) -> Any:
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    args = SDPOConfig(**common, num_generations=2, success_reward_threshold=0.0)  # every completion counts as a success
    return SDPOTrainer(policy, reward, args=args, train_dataset=DEMONSTRATIONS)


def tokenizer(policy: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(policy)


TAUGHT = (distillation, gold, iw_opd)  # by another model; the others learn from rewards or from themselves
BUILDERS = (grpo, rloo, gmpo, sdft, sdpo, *TAUGHT)


@pytest.mark.parametrize("build", BUILDERS)
def test_every_trainer_of_the_family_attaches_and_generates_on_the_server(
    build: Callable[..., Any], policy: str, stub: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Replica, "check", lambda self: None)  # the stub cannot change weights
    trainer = build(policy, settings(tmp_path, stub.url))
    callback = HubSyncCallback(trainer, SyncConfig(bucket=str(tmp_path / "bucket")))
    assert callback in trainer.callback_handler.callbacks
    trainer.remove_callback(callback)  # the stub could not receive its versions
    synchronised: list[int] = []
    trainer.vllm_generation._synchronise = lambda: synchronised.append(trainer.state.global_step)
    before = stub.generations
    trainer.train()
    assert synchronised == [0, 1], "before the first generation, and after every step"
    assert stub.generations >= before + 2


def test_trls_requests_carry_the_token_of_a_proxy(
    policy: str, stub: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Replica, "check", lambda self: None)  # the stub cannot change weights
    with TokenProxy(stub.url) as proxy:
        trainer = grpo(policy, settings(tmp_path, proxy.url))
        callback = HubSyncCallback(trainer, SyncConfig(bucket=str(tmp_path / "bucket"), api_key=TOKEN))
        trainer.remove_callback(callback)
        trainer.vllm_generation._synchronise = lambda: None
        trainer.train()
        assert {"/health", "/v1/models", "/v1/completions"} <= set(proxy.passed)
        assert proxy.refused == 0


def test_every_trainer_class_of_trl_is_covered() -> None:
    """A class added to the supported family is added here too."""
    assert {member.name for member in trl_checks.FAMILY} == {
        "GRPOTrainer",
        "RLOOTrainer",
        "DistillationTrainer",
        "GOLDTrainer",
        "IWOPDTrainer",
        "SDFTTrainer",
        "SDPOTrainer",
    }


def test_the_tested_range_includes_the_installed_version() -> None:
    """`make test-trl` runs this at the lower end of the range; the pinned environment has the upper end."""
    assert trl_checks.OLDEST <= Version(trl.__version__).release[:2] <= trl_checks.NEWEST_TESTED


def test_the_installed_trl_has_everything_that_hubsync_uses() -> None:
    assert trl_checks.moved() == []


@pytest.mark.parametrize(
    ("owner", "name", "says"),
    [
        ("trl.generation.vllm_generation.VLLMGeneration", "_init_vllm", "VLLMGeneration._init_vllm does not exist"),
        ("trl.GRPOTrainer", "_generate_single_turn", "GRPOTrainer no longer uses generate"),
        ("trl.experimental.gold.gold_trainer", "GOLDTrainer", "GOLDTrainer is not in trl.experimental.gold"),
        (
            "trl.experimental.async_grpo.async_rollout_worker._AsyncRolloutLoop",
            "_score_group",
            "_AsyncRolloutLoop._score_group does not exist",
        ),
        (
            "trl.experimental.async_grpo.async_grpo_trainer.WeightTransferProtocol",
            "send_weights",
            "AsyncGRPOTrainer's WeightTransferProtocol is",
        ),
    ],
)
def test_a_moved_trl_attribute_is_named(owner: str, name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(f"{owner}.{name}")
    assert any(text.startswith(says) for text in trl_checks.moved()), trl_checks.moved()


def test_attaching_is_refused_when_a_trl_attribute_has_moved(
    policy: str, stub: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = grpo(policy, settings(tmp_path, stub.url))
    monkeypatch.delattr("trl.GRPOTrainer._generate_single_turn")
    with pytest.raises(
        ConfigError, match=r"works with TRL 1\.13 to 1\.16, and the installed .* GRPOTrainer no longer uses generate"
    ):
        HubSyncCallback(trainer, SyncConfig(bucket=str(tmp_path / "bucket")))


def test_a_newer_trl_that_has_everything_is_used_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trl_checks._warn_of_untested.cache_clear()
    monkeypatch.setattr(trl, "__version__", "1.17.2")
    for kind in (trl.GRPOTrainer, trl.RLOOTrainer):
        trl_checks.require_unmoved(kind)
    (warning,) = (text for text in caplog.messages if "newer than the tested" in text)
    assert warning.startswith("TRL 1.17.2 is newer than the tested ones (1.13 to 1.16)")
