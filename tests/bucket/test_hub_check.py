"""`make test-hub`, the same command, against the local Hub: it cannot be run against the real one here."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hubsync.bucket.hub import HubBucket
from hubsync.localhub import LocalHub
from tests.hub import checks
from tests.hub.__main__ import main
from tests.hub.measuring import DIFFERS, FAILED, OK, SKIPPED, Site
from tests.support.fixtures_hub import TOKEN

ROOT = Path(__file__).parents[2]


@pytest.fixture
def site(hub_bucket: HubBucket, local_hub: LocalHub) -> Site:
    name = "/".join(hub_bucket.address.split("/")[3:5])
    return Site(local_hub.url, TOKEN, name, 0.0, 2, 1.0, None)


def verdicts(site: Site) -> dict[str, str]:
    return {result.what: result.verdict for result in site.results}


@pytest.fixture
def model(local_hub: LocalHub, hub_bucket: HubBucket) -> str:
    """A model repository with a file in Xet storage."""
    api, data = HfApi(endpoint=local_hub.url, token=TOKEN), os.urandom(1000)
    bucket = "/".join(hub_bucket.address.split("/")[3:5])
    api.batch_bucket_files(bucket, add=[(data, "model.safetensors")])
    local_hub.add_model(bucket, bucket, {"model.safetensors": hashlib.sha256(data).hexdigest()})
    return bucket


@pytest.mark.slow
def test_everything_holds_on_the_local_hub_and_nothing_is_left(local_hub: LocalHub, model: str, tmp_path: Path) -> None:
    local_hub.limit(10**6)
    before = [bucket.id for bucket in HfApi(endpoint=local_hub.url, token=TOKEN).list_buckets("me")]
    options = ["--rounds", "2", "--wait", "0", "--interval", "0.5", "--model", model, "--json", str(tmp_path / "json")]
    environment = os.environ | {"HF_ENDPOINT": local_hub.url, "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "tests.hub", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "json").read_text())
    other = [result for result in results if result["verdict"] != OK]
    assert [(result["verdict"], result["what"]) for result in other] == [
        (SKIPPED, "another user's bucket and namespace")
    ], done.stdout
    assert [bucket.id for bucket in HfApi(endpoint=local_hub.url, token=TOKEN).list_buckets("me")] == before


def test_a_lag_is_measured(site: Site, local_hub: LocalHub) -> None:
    local_hub.lag(0.2)
    checks.read_after_write_lag(site)
    assert set(verdicts(site).values()) == {OK}
    measured = {result.what: float(result.measured.split()[1]) for result in site.results[:3]}
    assert all(value >= 0.1 for what, value in measured.items() if "listing" not in what)


def test_writes_that_become_visible_out_of_order_are_found(site: Site, local_hub: LocalHub) -> None:
    local_hub.lag(0.2, "first")
    checks.read_after_write_lag(site)
    assert verdicts(site)["a later write visible before an earlier one"] == FAILED


def test_other_answers_than_the_docs_state_are_told(site: Site, local_hub: LocalHub) -> None:
    local_hub.fail("GET /api/buckets/[^/]*/[^/]*-missing$", status=403, times=1)
    checks.answers_without_access(site)
    assert verdicts(site)["missing bucket, no token"] == DIFFERS


def test_a_check_that_fails_is_a_line_and_the_others_go_on(site: Site) -> None:
    def some_check(site: Site) -> None:
        raise ValueError("broken")

    site.run(some_check)
    assert [(result.verdict, result.measured) for result in site.results] == [(FAILED, "ValueError: broken")]


def test_without_a_token_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.hub.__main__.get_token", lambda: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main([]) == 2
    assert "set HF_TOKEN" in capsys.readouterr().err
