"""Every promise of docs/DESIGN.md has a test that fails when the promise is broken."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations import MUTATIONS, PROMISES, Mutation

ROOT = Path(__file__).parents[1]

each_mutation = pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.path.stem)


def test_every_promise_has_a_mutation() -> None:
    numbered = re.findall(r"^(\d+)\. \*\*", (ROOT / "docs/DESIGN.md").read_text(), re.MULTILINE)
    assert [int(number) for number in numbered] == list(PROMISES)
    assert {mutation.promise for mutation in MUTATIONS} == set(PROMISES)


@each_mutation
def test_a_mutation_applies_and_names_an_existing_test(mutation: Mutation) -> None:
    file, _, name = mutation.test.partition("::")
    assert re.search(rf"def {re.escape(name.partition('[')[0])}\(", (ROOT / file).read_text())
    applied = subprocess.run(["git", "apply", "--check", mutation.path], cwd=ROOT, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr


@pytest.fixture(scope="module")
def copied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, compiled kernels included, in which the tests of the selected mutations pass."""
    copy = tmp_path_factory.mktemp("project") / "copy"
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", ".extras", ".megatron", ".trl-*", "build", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    items = [item for item in request.session.items if "copied" in getattr(item, "fixturenames", ())]
    tests = {item.callspec.params["mutation"].test for item in items}
    assert _run(copy, *sorted(tests)) == pytest.ExitCode.OK, "a test fails without its mutation"
    return copy


@pytest.mark.mutations
@each_mutation
def test_the_test_of_a_promise_fails_on_its_mutation(mutation: Mutation, copied: Path) -> None:
    subprocess.run(["git", "apply", mutation.path], cwd=copied, check=True)
    try:
        assert _run(copied, mutation.test) == pytest.ExitCode.TESTS_FAILED
    finally:
        subprocess.run(["git", "apply", "--reverse", mutation.path], cwd=copied, check=True)


def _run(copy: Path, *tests: str) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", "-m", "", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=1200)
    print(done.stdout[-2000:], done.stderr[-1000:])
    return done.returncode
