"""Commits on a real vLLM server under load: both cache policies, clients that die, and vLLM's own calls.

The server has both adapters, the worker extension and the weight transfer backend, and a watchdog that waits briefly.
"""

from __future__ import annotations

import random
import re
import signal
import threading
import time
from typing import Any

import httpx
import pytest

from hubsync.cli.main import main
from hubsync.demo.compare import greedy
from hubsync.replicas.replica import Replica
from tests.support.site import REPORTS_VERSIONS, Load, Site, client, generate, wait_running

pytestmark = pytest.mark.server

LONG = "the lazy dog plus 17 makes " * 40  # longer than a block of the prefix cache


# --- cached keys and values


@pytest.mark.parametrize("kv_cache", ["recompute", "keep"])
def test_no_later_request_shares_keys_and_values_of_old_weights(site: Site, kv_cache: str) -> None:
    """The long prompt is in the prefix cache before the commit, and running requests hold blocks during it."""
    before = greedy(site.url, [LONG])
    position, replica = site.publish(), Replica(site.server, kv_cache)
    replica.wait_staged(position)
    with Load(site.url):
        report = replica.commit(position)
        assert site.server.weight_version() == str(position.version)
    assert report.pause_s > 0
    after = greedy(site.url, [LONG])
    assert after != before
    site.assert_whole(position)
    assert site.server.reset_prefix_cache()
    assert greedy(site.url, [LONG]) == after, "nothing that the answer rests on was cached before the commit"


@pytest.mark.parametrize("kv_cache", ["recompute", "keep"])
def test_running_requests_go_on_and_report_both_versions(site: Site, kv_cache: str) -> None:
    old, new, replica = site.position, site.publish(), Replica(site.server, kv_cache)
    replica.wait_staged(new)
    answers: list[dict[str, Any]] = []
    request = threading.Thread(target=lambda: answers.append(generate(site.url, [5] * 20, 400)))
    request.start()
    wait_running(site.url)
    replica.commit(new)
    request.join()
    if REPORTS_VERSIONS:
        assert [span["version"] for span in answers[0]["weight_versions"]] == [str(old.version), str(new.version)]
    assert len(answers[0]["token_ids"]) == 400


# --- verification on request


def test_a_server_proves_its_weights_while_it_generates(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    with Load(site.url):
        assert main(["verify", "--server", site.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(
        re.match(r"rank \d: right, verified \d+ times, last [\d.]+ s ago in [\d.]+ s", line) for line in lines[:-1]
    )
    assert lines[-1] == f"{site.url} serves {site.position}, bit for bit"
    verification = Replica(site.server).status().verification
    assert verification is not None
    assert (verification.verified, verification.share) == (True, 0.02)


# --- clients that die


@pytest.mark.parametrize(("step", "commits"), [("pause", False), ("hubsync_commit", True)])
def test_a_server_that_its_client_left_paused_resumes_by_itself(site: Site, step: str, commits: bool) -> None:
    old, new = site.position, site.publish()
    assert client(site.url, [new], step).wait(timeout=120) == -signal.SIGKILL
    assert site.server.is_paused()
    deadline = time.monotonic() + 30
    while site.server.is_paused():
        assert time.monotonic() < deadline, "the watchdog does not resume it"
        time.sleep(0.05)
    site.assert_whole(new if commits else old)
    with Load(site.url):  # it serves
        pass
    Replica(site.server).commit(new)
    site.assert_whole(new)


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.long)])
def test_many_commits_under_load_with_clients_that_die_anywhere(count: int, site: Site) -> None:
    """After each commit the digest of all live weights agrees, and the versions of every response only increase."""
    dice = random.Random(0)
    first = site.position.version
    targets = [site.publish() for _ in range(count)]
    kills = 0
    with Load(site.url) as load:
        while (done := site.position.version - first) < count:
            process = client(site.url, targets[done:])
            assert process.stdout is not None
            for _ in range(dice.randint(2, 12)):
                if not process.stdout.readline():
                    break
            time.sleep(dice.uniform(0, 0.15))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
    Replica(site.server).attach()
    site.assert_whole(targets[-1])
    assert kills >= count // 15
    for answer in load.answers:
        versions = [int(span["version"]) for span in answer["weight_versions"]]
        assert versions == sorted(set(versions))
    if REPORTS_VERSIONS:
        assert {int(span["version"]) for answer in load.answers for span in answer["weight_versions"]} > {first}


# --- vLLM's own calls


def call(site: Site, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{site.url}/{path}", json=body or None, timeout=120)


def test_vllms_own_calls_reach_the_same_session(site: Site) -> None:
    position = site.publish()
    assert call(site, "init_weight_transfer_engine", init_info={}).is_success
    assert call(site, "start_weight_update").is_success
    update = {"version": position.version, "digest": position.digest}
    assert call(site, "update_weights", update_info=update).is_success
    assert httpx.post(f"{site.url}/pause", params={"mode": "keep"}, timeout=120).is_success
    assert call(site, "finish_weight_update", weight_version=str(position.version)).is_success
    assert httpx.post(f"{site.url}/resume", timeout=120).is_success
    site.assert_whole(position)


def test_a_failed_update_is_an_error_and_labels_nothing(site: Site) -> None:
    old = site.position
    assert call(site, "start_weight_update").is_success
    failed = call(site, "update_weights", update_info={"version": 9999, "digest": old.digest})
    assert failed.status_code == 500
    assert "9999" in failed.text
    assert not call(site, "finish_weight_update", weight_version="9999").is_success
    site.assert_whole(old)
    assert call(site, "start_weight_update").is_success, "the failed update is over"
    assert not call(site, "update_weights", update_info={"bucket": "somewhere else"}).is_success
    assert not call(site, "finish_weight_update").is_success, "a failed update has ended"
    site.assert_whole(old)
