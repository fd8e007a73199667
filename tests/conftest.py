"""Fixtures of all tests, and the order in which tests run."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings

pytest_plugins = ["tests.support.fixtures_hub", "tests.support.fixtures_server"]

# No deadline per example: machines are shared, so the time that a test takes says nothing about the code.
settings.register_profile("hubsync", deadline=None)
settings.load_profile("hubsync")


# Groups of tests that take a minute or more on two cores, the longest first.
_LONG_GROUPS = ("test_chaos", "served", "test_extension", "test_lora_server", "test_async_grpo", "test_doctor")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests for pytest-xdist (`--dist loadgroup`), and start the longest groups first.

    A group runs in one process. Tests of one file are a group, because they share fixtures; tests marked
    `xdist_group` share a server across files. Long groups first, so that all processes end at about the same time.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(_default_group(item)))
    items.sort(key=_start_order)


def _default_group(item: pytest.Item) -> str:
    """The file, in two halves where only some of its tests start a server."""
    return item.path.stem if item.get_closest_marker("server") else f"{item.path.parent.name}/{item.path.stem}"


def _start_order(item: pytest.Item) -> tuple[int, str]:
    marker = item.get_closest_marker("xdist_group")
    assert marker is not None
    group = marker.args[0]
    if group in _LONG_GROUPS:
        return _LONG_GROUPS.index(group), group
    kind = next((rank for rank, mark in enumerate(("server", "slow")) if item.get_closest_marker(mark)), 2)
    return len(_LONG_GROUPS) + kind, group


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
