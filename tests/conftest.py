import pytest
from hypothesis import settings

pytest_plugins = ["tests.fixtures_hub", "tests.fixtures_server"]

# How long a test takes says nothing about the code: machines are shared.
settings.register_profile("hubsync", deadline=None)
settings.load_profile("hubsync")


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of a test stays in the user's cache, or comes from another test."""
    monkeypatch.setenv("HUBSYNC_CACHE", str(tmp_path_factory.mktemp("cache")))
