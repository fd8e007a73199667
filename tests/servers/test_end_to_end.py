"""The promises of docs/DESIGN.md, on a real vLLM server, a real bucket protocol and a training loop."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
import transformers

from hubsync.bucket import Upload, open_bucket
from hubsync.chain import Layout
from hubsync.demo.compare import Greedy, greedy
from hubsync.errors import (
    BucketUnavailable,
    ObjectCorrupt,
    ObjectMissing,
    ReplicaRefused,
    ReplicaUnsuitable,
    RunMismatch,
)
from hubsync.format.manifest import Position
from hubsync.localhub import LocalHub
from hubsync.publish.config import SyncConfig
from hubsync.publish.engine import DeltaWeightTransferEngine
from hubsync.replicas.replica import Replica
from hubsync.replicas.vllm_http import VLLMServer
from tests.support.fixtures_server import Served
from tests.support.models import CONFIGS, save
from tests.support.site import client, generate, wait_running

pytestmark = pytest.mark.server

API_KEY = "s3cret-of-the-stranger"
TOY_PACKAGE = Path(__file__).parents[1] / "plugins" / "toy_package"

# One short, and one longer than a block of the prefix cache, so that stale keys and values would show.
PROMPTS = ["the quick brown fox", "the lazy dog plus 17 makes " * 40]


def assert_whole(server: VLLMServer, position: Position) -> None:
    """Running, verified at `position` and labelled so, with no commit window left open."""
    replica = Replica(server)
    replica.wait_verified(position)
    assert replica.status().window is None
    assert not server.is_paused()
    assert server.weight_version() == str(position.version)


def test_every_step_of_a_training_loop_arrives_bit_for_bit(served: Served) -> None:
    before = greedy(served.url, PROMPTS)
    for step in range(3):
        served.train()
        report = served.engine.sync(step)
        assert report.published.changed > 0
        assert report.commits[0].position == served.engine.position
        assert_whole(served.server, served.engine.position)
    assert greedy(served.url, PROMPTS) != before


@dataclass
class Stranger:
    """A server of an anchor of the run, whose pinned bucket is another run's.

    It has an API key, no development endpoints, and two plugins.
    """

    url: str
    address: str
    checkpoint: Path
    position: Position
    trained_in_place: list[Greedy]


@pytest.fixture(autouse=True)
def _api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the stranger. The other server has none, and takes any."""
    monkeypatch.setenv("VLLM_API_KEY", API_KEY)


@pytest.fixture(scope="module")
def stranger(served: Served, start_server: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Stranger:
    served.train()
    served.engine.sync()
    anchor = served.engine.anchor()
    checkpoint = served.reader(tmp_path_factory.mktemp("cache")).fetch(anchor)[0].parent
    transformers.AutoTokenizer.from_pretrained(served.base).save_pretrained(checkpoint)
    address = "hf://buckets/me/stranger/run"
    url = start_server(
        checkpoint,
        bucket=address,
        environment={
            "VLLM_SERVER_DEV_MODE": "",
            "VLLM_PLUGINS": "hubsync,hubsync_toy",
            "PYTHONPATH": os.pathsep.join([str(TOY_PACKAGE), os.environ.get("PYTHONPATH", "")]),
        },
        arguments=["--api-key", API_KEY, "--enable-scale-out"],
    )
    return Stranger(url, address, checkpoint, anchor.position, greedy(served.url, PROMPTS))


def test_a_fresh_server_of_an_anchor_computes_exactly_what_the_followed_one_does(stranger: Stranger) -> None:
    assert greedy(stranger.url, PROMPTS) == stranger.trained_in_place


def test_a_server_only_attaches_to_a_run_that_its_weights_belong_to(
    stranger: Stranger, served: Served, tmp_path: Path
) -> None:
    replica, bucket = Replica(VLLMServer(stranger.url)), open_bucket(stranger.address, create=True)
    with pytest.raises(ObjectMissing, match="start the trainer"):
        replica.attach()

    def begin_run(directory: Path, **sizes: int) -> None:
        config = CONFIGS["qwen3_tied"]()
        config.update(sizes)
        bucket.delete([Layout.RUN])
        model = transformers.AutoModelForCausalLM.from_pretrained(save(config, directory))
        DeltaWeightTransferEngine(model, None, SyncConfig(bucket=stranger.address)).close()

    begin_run(tmp_path / "wider", intermediate_size=384)
    with pytest.raises((RunMismatch, ReplicaRefused), match="mlp"):
        replica.attach()
    begin_run(tmp_path / "untrained")  # the same tensors, but the version before the first training step
    with pytest.raises(RunMismatch, match="not started from a version of the run"):
        replica.attach()
    assert greedy(stranger.url, PROMPTS) == stranger.trained_in_place


def test_a_server_without_development_mode_is_driven_behind_its_api_key(stranger: Stranger, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(stranger.checkpoint, dtype=torch.float32)
    open_bucket(stranger.address, create=True).delete([Layout.RUN])
    config = SyncConfig(bucket=stranger.address, servers=[stranger.url])
    with DeltaWeightTransferEngine(model, None, config) as engine:
        for step in range(2):
            with torch.no_grad():
                model.model.norm.weight.add_(0.25)
            engine.sync(step)
        server, position = VLLMServer(stranger.url), engine.position
    assert_whole(server, position)
    assert Replica(server, pause=True).commit(position).changed == 0
    server.pause()
    assert server.is_paused()
    assert server.logprobs_mode() == "raw_logprobs"
    server.resume()
    series = httpx.get(f"{stranger.url}/metrics").text
    assert re.search(rf"vllm:hubsync_version{{.*}} {position.version}\.0", series)
    assert re.search(r"vllm:hubsync_commit_seconds_count{.*} 2\.0", series)
    for path in ("/collective_rpc", "/pause", "/weight_info", "/init_weight_transfer_engine"):
        assert httpx.post(stranger.url + path, headers=server.access.headers, json={}).status_code == 404
    with pytest.raises(ReplicaUnsuitable, match="wants another API key"):
        VLLMServer(stranger.url, "guessed").rpc("hubsync_status")
    assert httpx.post(f"{stranger.url}/v1/hubsync/undo").status_code == 401
    demand = {"X-Hubsync-Version": "999"}
    assert httpx.post(f"{stranger.url}/v1/completions", headers=demand).status_code == 401
    assert httpx.get(f"{stranger.url}/health", headers=demand).status_code == 200


def test_another_endpoint_plugin_answers_beside_it(stranger: Stranger) -> None:
    headers = VLLMServer(stranger.url).access.headers
    assert httpx.get(f"{stranger.url}/v1/toy", headers=headers).json() == {"toy": True}


def test_requests_in_flight_finish_and_report_both_versions(served: Served) -> None:
    served.engine.sync()
    old, tokens, answers = served.engine.position.version, 400, []
    new = publish(served)
    served.replica.wait_staged(new)  # so that the commit takes less time than the request
    request = threading.Thread(target=lambda: answers.append(generate(served.url, list(range(5, 25)), tokens)))
    request.start()
    wait_running(served.url)
    served.replica.commit(new)
    request.join()
    spans = answers[0]["weight_versions"]
    assert [span["version"] for span in spans] == [str(old), str(new.version)]
    assert (spans[0]["start"], spans[-1]["end"], spans[0]["end"]) == (0, tokens, spans[1]["start"])
    assert len(answers[0]["token_ids"]) == tokens


@pytest.mark.parametrize(
    ("step", "commits"),
    [("hubsync_open", False), ("pause", False), ("hubsync_commit", True), ("resume", True)],
)
def test_a_client_killed_in_the_commit_window_leaves_a_server_that_the_next_one_completes(
    served: Served, step: str, commits: bool
) -> None:
    old = served.engine.position
    new = publish(served)
    assert client(served.url, [new], step).wait(timeout=120) == -signal.SIGKILL
    assert served.replica.status().window.position == new

    assert served.replica.recover()
    assert_whole(served.server, new if commits else old)
    served.engine.sync()
    assert_whole(served.server, new)


def publish(served: Served) -> Position:
    served.train()
    return served.engine.publish().result().position


def test_a_corrupted_part_is_refused_while_the_old_weights_serve(
    served: Served, local_hub: LocalHub, tmp_path: Path
) -> None:
    served.engine.sync()
    old, before = served.engine.position, greedy(served.url, PROMPTS)
    local_hub.fail("GET /xorbs", status=503, times=1000)  # the server, told of the new version at once, cannot fetch it
    new = publish(served)
    with pytest.raises(BucketUnavailable):
        served.replica.wait_staged(new)
    local_hub.reset()

    reader, bucket = served.reader(tmp_path), open_bucket(served.address)
    manifest = reader.manifest(new.version)
    good = reader.fetch(manifest)[0].read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    bucket.put([Upload(Layout.part(manifest, manifest.parts[0]), bytes(bad))])
    with pytest.raises(ObjectCorrupt):
        served.replica.wait_staged(new)
    with pytest.raises(ReplicaRefused):
        served.replica.commit(new)
    assert_whole(served.server, old)
    assert greedy(served.url, PROMPTS) == before

    bucket.put([Upload(Layout.part(manifest, manifest.parts[0]), good)])
    served.engine.sync()
    assert_whole(served.server, new)


def test_versions_missed_by_a_server_arrive_as_one(served: Served) -> None:
    served.engine.sync()
    version = served.engine.position.version
    for _ in range(3):
        publish(served)
    served.engine.sync()
    assert served.engine.position.version == version + 3
    assert_whole(served.server, served.engine.position)


def test_a_server_goes_back_to_an_older_version_on_request(served: Served, tmp_path: Path) -> None:
    served.engine.sync()
    old, before = served.engine.position, greedy(served.url, PROMPTS)
    served.train()
    served.engine.sync()
    served.replica.wait_staged(old)
    served.replica.commit(old)
    assert_whole(served.server, old)
    assert greedy(served.url, PROMPTS) == before
    served.engine.sync()
    assert_whole(served.server, served.engine.position)


def test_a_server_without_the_extension_is_reported(served: Served) -> None:
    with pytest.raises(ReplicaUnsuitable, match="worker-extension-cls"):
        served.server.rpc("hubsync_of_another_extension")
