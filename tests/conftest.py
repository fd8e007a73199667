"""Fixtures of all tests, and the order in which tests run."""

from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.support import on_gpu

pytest_plugins = ["tests.support.fixtures_hub", "tests.support.fixtures_server"]

# No deadline per example: machines are shared, so the time that a test takes says nothing about the code.
settings.register_profile("hubsync", deadline=None)
settings.load_profile("hubsync")


# --- several processes: `pytest -n 2` ------------------------------------------------------------------

# Files whose tests run in one process; most of them because they share a server (a session fixture).
_SHARED = {
    # Two workers that wait for each other by spinning take both cores: one such server at a time.
    "test_lockstep": "two workers",
    "test_lora_server": "two workers",
    "test_native": "two workers",
    "test_parallel_engines": "two workers",
    "test_end_to_end": "served",
    "test_reference": "served",
    "test_space": "served",
    "test_commits": "site",
    "test_pull": "site",
    "test_sampler_vllm": "site",
    "test_turns": "site",
}

# Groups that take a minute or more on two cores, the longest first.
_LONG_GROUPS = ("two workers", "test_extension", "site", "served", "test_async_grpo", "test_doctor", "test_demo")


def _group_of(nodeid: str) -> str:
    """The group of a test. A group runs in one process: the tests of one file, which share fixtures, or of several."""
    file = PurePosixPath(nodeid.split("::")[0])
    if file.stem == "test_chaos":  # its tests share nothing
        return nodeid
    return _SHARED.get(file.stem, file.stem if file.parent.name == "servers" else str(file))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute whole groups, in the order of collection."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group_of(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest groups first, so that all processes end at about the same time."""
    kinds: dict[str, set[str]] = {}
    for item in items:
        marks = [mark for mark in ("server", "slow") if item.get_closest_marker(mark)]
        kinds.setdefault(_group_of(item.nodeid), set()).update(marks)

    def order(item: pytest.Item) -> tuple[int, str]:
        group = _group_of(item.nodeid)
        if group in _LONG_GROUPS:
            return _LONG_GROUPS.index(group), group
        kind = 0 if "server" in kinds[group] else 1 if "slow" in kinds[group] else 2
        return len(_LONG_GROUPS) + kind, group

    items.sort(key=order)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that launches kernels where a process with Triton's interpreter runs it."""
    runs_them = getattr(getattr(item, "function", None), "__module__", "") == on_gpu.__name__
    if item.get_closest_marker("on_device") and not (on_gpu.HERE or runs_them):
        pytest.skip("runs in a separate process")


# --- fixtures ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each test has an empty cache; the user's is not touched."""
    monkeypatch.setenv("HUBSYNC_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads, for one test.

    Not `torch.set_num_threads`: vLLM replaces it with a function that does nothing in every process that ran an engine,
    and tests would run on one thread unnoticed.
    """
    before = torch.get_num_threads()
    yield torch._C.set_num_threads
    torch._C.set_num_threads(before)
    assert torch.get_num_threads() == before
