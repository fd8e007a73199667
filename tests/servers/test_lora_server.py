"""Adapters on a real vLLM server of two workers: pushed, pulled, rolled back, and generated with by trainers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
import transformers
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from hubsync.bucket import open_bucket
from hubsync.chain import ChainReader
from hubsync.cli.main import main
from hubsync.errors import ReplicaRefused
from hubsync.format.manifest import Position
from hubsync.integrations.trl import HubSyncCallback, HubWeightTransfer
from hubsync.publish.config import SyncConfig
from hubsync.publish.engine import DeltaWeightTransferEngine
from hubsync.replicas.follower import Follower
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer
from tests.support.adapted import adapted, lora, train
from tests.support.async_toy import digest_of, make_trainer, save_policy, without_gpu
from tests.support.launched import launch
from tests.support.site import core_per_worker

pytestmark = pytest.mark.server

ADDRESS = "hf://buckets/me/lora/run"
PROMPT = list(range(5, 45))


@dataclass
class Site:
    """A run of adapters, and a server that follows it. Tests continue the run where the one before left it."""

    base: Path
    url: str
    cache: Path
    model: peft.PeftModel
    engine: DeltaWeightTransferEngine

    @property
    def replica(self) -> Replica:
        return Replica(VLLMServer(self.url))

    @property
    def position(self) -> Position | None:
        """Of all workers."""
        status = self.replica.status()
        assert len(status.ranks) == 2
        return status.position

    def logprobs(self, model: str = "policy") -> torch.Tensor:
        """Log-probabilities that the server gives to the tokens of `PROMPT`, but the first."""
        request = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        answer = httpx.post(f"{self.url}/v1/completions", json=request, timeout=120)
        answer.raise_for_status()
        given = answer.json()["choices"][0]["prompt_logprobs"][1:]
        return torch.tensor([token[str(number)]["logprob"] for token, number in zip(given, PROMPT[1:], strict=True)])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().mean())


def expected(base: Path, adapter: Path | None, tokens: list[int] = PROMPT) -> torch.Tensor:
    """The same of PEFT, from a directory that was pulled; of the base model, without one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.fixture(scope="module")
def site(start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    base, cache = save_policy(tmp_path_factory.mktemp("base")), tmp_path_factory.mktemp("cache")
    url = start_server(
        base,
        bucket=ADDRESS,
        environment={
            **core_per_worker(),
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "HUBSYNC_CACHE": str(cache),
        },
        arguments=[
            *("--tensor-parallel-size", "2", "--enable-lora", "--max-lora-rank", "8"),
            *("--enable-scale-out", "--logprobs-mode", "processed_logprobs"),
        ],
    )
    model = adapted(base)
    with DeltaWeightTransferEngine(model, None, SyncConfig(bucket=ADDRESS, servers=[url])) as engine:
        engine.sync()
        yield Site(base, url, cache, model, engine)


def test_a_fresh_adapter_changes_nothing_and_every_pushed_version_computes_what_peft_does(
    site: Site, tmp_path: Path
) -> None:
    before = site.logprobs()
    assert torch.equal(before, site.logprobs(str(site.base)))
    for step in range(2):
        train(site.model, 0.2)
        report = site.engine.sync(step)
        assert site.position == report.commits[0].position == site.engine.position
        assert site.replica.server.weight_version() == str(site.engine.position.version)
        out = tmp_path / str(step)
        assert main(["pull", ADDRESS, str(out)]) == 0
        now = site.logprobs()
        assert distance(now, expected(site.base, out)) < distance(now, before) / 5, "no more than the noise of bfloat16"
        before = now


def test_a_follower_goes_back_to_an_older_version_and_forward_again_to_the_very_same(
    site: Site, tmp_path: Path
) -> None:
    newest, at_newest = site.engine.position, site.logprobs()
    follower = Follower(lambda: ChainReader(open_bucket(ADDRESS), tmp_path), site.replica)
    older = site.engine.serve(newest.version - 1)
    followed = follower.step()
    assert followed is not None
    assert followed.lag == -1
    assert site.position == older
    assert not torch.equal(site.logprobs(), at_newest)
    site.engine.serve(newest.version)
    follower.step()
    assert site.position == newest
    assert torch.equal(site.logprobs(), at_newest)
    verified = site.replica.verify().verification
    assert verified is not None
    assert (verified.verified, verified.healed) == (True, None), "vLLM's copies, and the base model, are unchanged"


def test_what_is_not_staged_is_not_loaded(site: Site) -> None:
    before = site.position
    with pytest.raises(ReplicaRefused, match="not staged"):
        site.replica.server.rpc("hubsync_commit", 99, "0" * 32)
    assert site.position == before


def test_a_version_that_a_worker_cannot_load_is_refused_by_all_and_comes_when_it_is_staged_again(site: Site) -> None:
    before, computed = site.position, site.logprobs()
    train(site.model, 0.2)
    newest = site.engine.publish().result().position
    site.replica.wait_staged(newest)
    (staged,) = site.cache.glob(f"adapters/*/{newest.version:08d}-*/adapter_model.safetensors")
    staged.write_bytes(b"the disk was full")
    with pytest.raises(ReplicaRefused, match="could not load the adapter"):
        site.replica.commit(newest)
    assert site.position == before
    assert torch.equal(site.logprobs(), computed)
    site.replica.wait_staged(newest)
    site.replica.commit(newest)
    assert site.position == newest
    assert not torch.equal(site.logprobs(), computed)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [random.random() for _ in completions]


def test_grpo_trains_an_adapter_and_generates_with_it(site: Site, tmp_path: Path) -> None:
    """On the server of the run that the tests above have made: the same adapter, trained on."""
    trainer = GRPOTrainer(
        str(site.base),
        reward,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=8,
            learning_rate=1e-2,
            vllm_server_base_url=site.url,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"{i} plus 1" for i in range(8)]}),
        peft_config=lora(),
    )
    before, computed = site.position, site.logprobs()
    callback = HubSyncCallback(trainer, SyncConfig(bucket=ADDRESS))
    assert trainer.vllm_generation.vllm_client.model == "policy"
    trainer.train()
    after = site.position
    assert before is not None
    assert after is not None
    assert after.version >= before.version + 3, "the fresh adapter, and one for each step"
    assert callback.commits == 3
    out = tmp_path / "out"
    assert main(["pull", ADDRESS, str(out)]) == 0
    assert distance(site.logprobs(), expected(site.base, out)) < distance(site.logprobs(), computed) / 5


@pytest.mark.long  # minutes, while two workers spin on both cores
def test_asynchronous_grpo_trains_an_adapter_and_its_samples_are_of_the_versions_that_they_say(
    site: Site, tmp_path: Path
) -> None:
    transfer = HubWeightTransfer(SyncConfig(bucket=ADDRESS), timeout=600)
    samples: list[Any] = []
    with without_gpu():
        trainer = make_trainer(
            site.base,
            tmp_path,
            site.url,
            max_steps=2,
            max_staleness=1,
            max_completion_length=24,  # two workers that wait for each other by spinning leave few cores to the rest
            weight_transfer=transfer,
            peft_config=lora(),
        )
        train(trainer.model, 0.2)  # away from the base, so that it can be seen who generates
        transfer.attach(trainer)
        take = trainer.rollout_queue.get

        def watched_take(*args: Any, **kwargs: Any) -> Any:
            samples.append(take(*args, **kwargs))
            return samples[-1]

        trainer.rollout_queue.get = watched_take
        trainer.train()
    assert site.position == transfer.last.position
    assert site.position is not None
    assert site.position.digest == digest_of(trainer.model)
    published = transfer.version_map.versions
    assert len(published) == 3, "before training, and one for each step"
    for sample in samples:
        oldest, newest = (int(sample.metrics[f"weight_sync/version_{end}"]) for end in ("min", "max"))
        assert published[sample.model_version] <= oldest <= newest <= site.position.version
    first = samples[0]
    made_by, out = str(int(first.metrics["weight_sync/version_max"])), tmp_path / "out"
    assert main(["pull", ADDRESS, str(out), "--version", made_by]) == 0
    tokens, stated = first.input_ids.tolist(), torch.from_numpy(first.old_log_probs)
    completion = torch.from_numpy(first.completion_mask).bool()[1:]
    off, off_base = (
        distance(expected(site.base, adapter, tokens)[completion], stated[1:][completion]) for adapter in (out, None)
    )
    assert off < off_base / 5, "no more than the noise of bfloat16"


@pytest.mark.parametrize("how", [pytest.param("ddp", marks=pytest.mark.long), "fsdp2"])
def test_two_ranks_publish_the_adapter_that_they_train_each_a_part_of_it(how: str, site: Site, tmp_path: Path) -> None:
    before = site.position
    assert before is not None
    launch(how, "tests.support.async_ranks", site.base, site.url, ADDRESS, tmp_path, 300, 4)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (first["ranks"], first["gathered"], second["gathered"]) == (2, 0, 0)
    assert first["trained"] == second["trained"] == first["served"] == second["served"]
    assert first["version"] >= before.version + 3, "a fresh adapter, and one for each step"
    assert site.position == Position(first["version"], first["served"])
    reader = ChainReader(open_bucket(ADDRESS), tmp_path / "cache")
    newest = list(reader.manifests())[-1]
    assert (newest.kind, {part.rank for part in newest.parts}) == ("delta", {0, 1})
