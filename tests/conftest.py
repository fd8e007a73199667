from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings

pytest_plugins = ["tests.support.fixtures_hub", "tests.support.fixtures_server"]

# How long a test takes says nothing about the code: machines are shared.
settings.register_profile("hubsync", deadline=None)
settings.load_profile("hubsync")


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of a test stays in the user's cache, or comes from another test."""
    monkeypatch.setenv("HUBSYNC_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Says how many threads torch takes, for one test.

    Not `torch.set_num_threads`: in a process in which vLLM's engine has run, vLLM has put something there that does
    nothing, and tests would run on one thread unnoticed.
    """
    before = torch.get_num_threads()
    yield torch._C.set_num_threads
    torch._C.set_num_threads(before)
    assert torch.get_num_threads() == before
