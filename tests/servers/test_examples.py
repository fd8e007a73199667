"""Every example trains a tiny model, with a real server (`examples/weight_syncer` runs in tests/lifecycle).

Replaced: the model, the data, and the reward, because math-verify is not installed here; for the asynchronous trainer
also the parts of a GPU that `tests/support/async_toy.py` names.
"""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer
from tests.support.async_toy import GENERATIONS, save_policy, share_of_vowels, without_gpu
from tests.support.vision_models import HAS_TORCHVISION, save_vision_checkpoint

pytestmark = [pytest.mark.server, pytest.mark.long]

EXAMPLES = Path(__file__).parents[2] / "examples"
ADDRESS, ADAPTERS = "hf://buckets/me/examples/run", "hf://buckets/me/examples/adapters"
ADAPTER = ("--use_peft", "--lora_r", 8, "--lora_alpha", 16, "--lora_target_modules", "q_proj", "v_proj")
PLAIN = ["--enable-scale-out", "--logprobs-mode", "processed_logprobs"]


@dataclass
class Place:
    checkpoint: Path
    data: Path
    url: str
    address: str

    def newest(self, cache: Path) -> int:
        """The newest version of the run, which the server serves, verified."""
        newest = ChainReader(open_bucket(self.address), cache).newest()
        Replica(VLLMServer(self.url)).wait_verified(newest)
        return newest.version


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny policy, and data as `load_dataset` takes it from a directory."""
    root = tmp_path_factory.mktemp("examples")
    questions = [{"prompt": [{"role": "user", "content": f"{i} plus 1"}], "solution": str(i + 1)} for i in range(16)]
    (root / "data").mkdir()
    Dataset.from_list(questions).to_json(root / "data" / "train.jsonl")
    return save_policy(root / "policy"), root / "data"


@pytest.fixture(scope="module")
def place(files: tuple[Path, Path], start_server: Callable[..., str]) -> Place:
    return Place(*files, start_server(files[0], bucket=ADDRESS, arguments=PLAIN), ADDRESS)


@pytest.fixture(scope="module")
def lora_place(files: tuple[Path, Path], start_server: Callable[..., str]) -> Place:
    url = start_server(
        files[0],
        bucket=ADAPTERS,
        environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"},
        arguments=["--logprobs-mode", "processed_logprobs", "--enable-lora", "--max-lora-rank", "16"],
    )
    return Place(*files, url, ADAPTERS)


@pytest.fixture(autouse=True)
def _reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.rewards.accuracy_reward", share_of_vowels)


def run(monkeypatch: pytest.MonkeyPatch, script: str, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def options(place: Place, output: Path) -> list[object]:
    """As in the docstrings of the examples, with small numbers."""
    return [
        *("--model_name_or_path", place.checkpoint, "--dataset_name", place.data, "--bucket", place.address),
        *("--vllm_server_base_url", place.url, "--output_dir", output, "--learning_rate", 1e-3, "--max_steps", 2),
        *("--per_device_train_batch_size", GENERATIONS, "--num_generations", GENERATIONS),
        *("--max_completion_length", 16, "--report_to", "none", "--use_cpu", "--bf16", "False", "--logging_steps", 1),
        *("--gradient_checkpointing", "False"),
    ]


def test_grpo_disaggregated(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "grpo_disaggregated/train.py", *options(place, tmp_path / "out"))
    assert place.newest(tmp_path / "cache") >= 2
    assert (tmp_path / "out" / "config.json").exists()


def test_one_gpu(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM cannot sleep on a CPU: its two calls are only noted here. `tests/servers/test_gpu.py` has real ones."""
    turns: list[tuple[str, int]] = []

    def noted(url: str, **_: object) -> httpx.Response:
        position = Replica(VLLMServer(place.url)).status().position
        turns.append((url.removeprefix(f"{place.url}/"), -1 if position is None else position.version))
        return httpx.Response(200, request=httpx.Request("POST", url))

    monkeypatch.setattr("httpx.post", noted)
    run(monkeypatch, "one_gpu/train.py", *options(place, tmp_path / "out"))
    newest = place.newest(tmp_path / "cache")
    assert [call for call, _ in turns] == ["wake_up", "sleep"] * (len(turns) // 2)
    assert turns[-1][1] > turns[0][1], "versions were committed between waking up and sleeping"
    assert newest > turns[0][1]


def test_async_grpo(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = ("--servers", place.url, "--quorum", 1, "--token_budget", -1, "--heartbeat_stale_after_s", 600)
    with without_gpu():
        run(monkeypatch, "async_grpo/train.py", *options(place, tmp_path / "out"), *servers)
    assert place.newest(tmp_path / "cache") >= 2
    assert (tmp_path / "out" / "config.json").exists()


def test_torch_loop(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ("--model_name_or_path", place.checkpoint, "--bucket", place.address, "--servers", place.url)
    run(monkeypatch, "torch_loop/train.py", *model, "--steps", 2)
    assert place.newest(tmp_path / "cache") >= 2


def test_rollouts(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replica = Replica(VLLMServer(place.url))
    if replica.status().position is None:  # as the example's README: the server follows a run
        test_torch_loop(place, tmp_path, monkeypatch)
    run(monkeypatch, "rollouts/rollouts.py", "--servers", place.url, "--k", 2, "--max_tokens", 8)
    assert "40 samples, 0 too old" in capsys.readouterr().out


def test_lora(lora_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "lora/train.py", *options(lora_place, tmp_path / "out"), *ADAPTER)
    assert lora_place.newest(tmp_path / "cache") >= 2
    assert (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter"])
def test_sft(adapted: bool, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer does not know the server, which follows."""
    place: Place = request.getfixturevalue("lora_place" if adapted else "place")
    texts = tmp_path / "texts"
    texts.mkdir()
    Dataset.from_list([{"text": f"{i} plus 1 makes {i + 1}"} for i in range(8)]).to_json(texts / "train.jsonl")
    before = position_of(place)
    run(
        monkeypatch,
        "sft/train.py",
        *("--model_name_or_path", place.checkpoint, "--dataset_name", texts, "--bucket", place.address),
        *("--publish_every", 2, "--output_dir", tmp_path / "out", "--learning_rate", 1e-3, "--max_steps", 5),
        *("--report_to", "none", "--use_cpu", "--bf16", "False", "--gradient_checkpointing", "False"),
        *("--per_device_train_batch_size", 2, *(ADAPTER if adapted else ())),
    )
    reader = ChainReader(open_bucket(place.address), tmp_path / "cache")
    newest = reader.newest().version
    assert [reader.manifest(newest - past).step for past in (2, 1, 0)] == [2, 4, 5]
    assert position_of(place) == before, "nobody has told the server"
    follow(monkeypatch, place)
    assert place.newest(tmp_path / "cache") == newest


def test_four_servers(
    place: Place,
    start_server: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    others = [start_server(place.checkpoint, bucket=ADDRESS, arguments=PLAIN) for _ in range(3)]
    servers = ("--servers", place.url, *others, "--quorum", 3)
    run(monkeypatch, "four_servers/train.py", *options(place, tmp_path / "out"), *servers)
    newest = place.newest(tmp_path / "cache")
    assert newest >= 2
    for url in others:
        Replica(VLLMServer(url)).wait_verified(ChainReader(open_bucket(ADDRESS), tmp_path / "cache").newest())
    counts = re.findall(r"(http://\S+): (\d+)", capsys.readouterr().out)
    assert sum(int(count) for _, count in counts) == 2 * GENERATIONS
    assert len({url for url, _ in counts}) > 1, "one server has made all completions"


def test_evaluation_of_anchors(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two anchors, with versions between and after them that the server does not serve."""
    model = AutoModelForCausalLM.from_pretrained(place.checkpoint, dtype="float32")
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=ADDRESS, servers=[place.url])) as engine:
        engine.sync(0)  # after the other tests, this restarts the run from the base
    anchors = []
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=ADDRESS)) as engine:
        for step in range(1, 6):
            model.lm_head.weight.data[: 10 * step] += 0.5
            engine.publish(step).result()
            if step % 2 == 0:
                anchors.append(engine.anchor().position)
    server = ("--server", place.url, "--anchors", 2, "--max_tokens", 4)
    run(monkeypatch, "evaluation/evaluate.py", "--bucket", ADDRESS, *server)
    evaluated = re.findall(r"^version (\d+): ", capsys.readouterr().out, re.MULTILINE)
    assert evaluated == [str(anchor.version) for anchor in anchors]
    assert position_of(place) == anchors[-1], "not the newest version, which is no anchor"


@pytest.mark.matrix  # `make test-matrix` has torchvision, which processors need
@pytest.mark.skipif(not HAS_TORCHVISION, reason="needs torchvision")
def test_grpo_of_a_vision_language_model(
    start_server: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = save_vision_policy(tmp_path / "policy"), tmp_path / "data"
    data.mkdir()
    pictures = [Image.new("RGB", (64, 64), (40 * i, 200 - 40 * i, 99)) for i in range(4)]
    rows = {"image": pictures, "problem": ["colour"] * 4, "solution": ["red"] * 4}
    Dataset.from_dict(rows).cast_column("image", ImageFeature()).to_parquet(data / "train.parquet")
    address = "hf://buckets/me/examples/vision"
    url = start_server(base, bucket=address, arguments=PLAIN)
    place = Place(base, data, url, address)
    before = visual_weights(base)
    run(monkeypatch, "grpo_vlm/train.py", *options(place, tmp_path / "out"))
    assert place.newest(tmp_path / "cache") >= 1
    assert not torch.equal(before, visual_weights(tmp_path / "out")), "the vision tower was not trained"


def save_vision_policy(directory: Path) -> Path:
    """A tiny Qwen3-VL whose template renders images, as real ones do."""
    save_vision_checkpoint("qwen3_vl", directory)
    template = """{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
            {%- else %}{{ part['text'] }}{% endif %}
        {%- endfor %}{% endif %}{% endfor %}"""
    processor = AutoProcessor.from_pretrained(directory)
    processor.chat_template = processor.tokenizer.chat_template = template
    processor.save_pretrained(directory)
    return directory


def visual_weights(directory: Path) -> torch.Tensor:
    weights = load_file(directory / "model.safetensors")
    return torch.cat([tensor.flatten().float() for name, tensor in weights.items() if "visual" in name])


def position_of(place: Place) -> object:
    return Replica(VLLMServer(place.url)).status().position


def follow(monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    monkeypatch.setattr(sys, "argv", ["hubsync", "follow", place.address, "--server", place.url, "--once"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("hubsync", run_name="__main__")
    assert not ended.value.code
