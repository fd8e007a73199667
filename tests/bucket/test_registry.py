"""Bucket backends are chosen by the scheme of the address; packages add schemes through an entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hubsync.bucket import LocalBucket, SignedBucket, open_bucket
from hubsync.bucket.registry import ENTRY_POINTS
from hubsync.cli.main import main
from hubsync.errors import ConfigError
from hubsync.format.keys import SigningKey
from tests.support.history import History

PACKAGE = '''
"""A third-party package: `toy://x` is the directory `$TOY_ROOT/x`."""

import os
from pathlib import Path

from hubsync.bucket import LocalBucket


class ToyBucket(LocalBucket):
    def __init__(self, address, *, create, token, endpoint):
        super().__init__(Path(os.environ["TOY_ROOT"], address.removeprefix("toy://")), create=create)
        self.address = address
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a distribution that registers schemes, and puts `toy_bucket` on the path."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "toy_bucket.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("TOY_ROOT", str(tmp_path / "toys"))

    def add(name: str, **schemes: str) -> None:
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"[{ENTRY_POINTS}]", *(f"{scheme} = {value}" for scheme, value in schemes.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")

    return add


def test_a_registered_scheme_opens_its_backend(install) -> None:
    install("toy-bucket", toy="toy_bucket:ToyBucket")
    bucket = open_bucket("toy://x", create=True)
    assert type(bucket).__name__ == "ToyBucket"
    bucket.commit("head.json", b"1")
    assert open_bucket("toy://x").read(["head.json"]) == {"head.json": b"1"}
    assert isinstance(open_bucket("toy://x", key=SigningKey.generate()), SignedBucket)


def test_commands_take_a_registered_scheme(install, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install("toy-bucket", toy="toy_bucket:ToyBucket")
    history = History(LocalBucket(tmp_path / "toys" / "x", create=True))
    history.publish()
    assert main(["ls", "toy://x"]) == 0
    assert "1  delta" in capsys.readouterr().out


def test_an_unknown_scheme_names_the_known_ones_and_how_to_add_one(install) -> None:
    install("toy-bucket", toy="toy_bucket:ToyBucket")
    with pytest.raises(ConfigError) as raised:
        open_bucket("s3://bucket/run")
    for part in ("no backend for s3:// is installed", "hf://buckets/", "toy://", "directory", "'hubsync.buckets'"):
        assert part in str(raised.value)


def test_a_backend_that_cannot_be_imported_is_named(install) -> None:
    install("broken", broken="no_such_module:Bucket")
    with pytest.raises(ConfigError, match=r"broken:// \(no_such_module:Bucket\) cannot be loaded: ModuleNotFound"):
        open_bucket("broken://x")


def test_two_backends_for_one_scheme_are_an_error(install) -> None:
    install("one", toy="toy_bucket:ToyBucket")
    install("two", toy="toy_bucket:LocalBucket")
    with pytest.raises(ConfigError, match="several packages register"):
        open_bucket("toy://x")


def test_built_in_schemes_cannot_be_replaced(install, tmp_path: Path) -> None:
    install("greedy", hf="toy_bucket:ToyBucket")
    with pytest.raises(ConfigError, match="is not a bucket address"):
        open_bucket("hf://x", create=True)  # HubBucket's own check


def test_settings_of_the_user_and_of_other_code_stay_as_they_are() -> None:
    """hf_xet and huggingface_hub are shared with the user's own code."""
    code = """
import os
from huggingface_hub.utils import get_session
from hf_xet import XetConfig

before, session = dict(os.environ), get_session()
import hubsync.bucket.hub as hub
from hubsync.bucket import xet
from hubsync.errors import BucketUnavailable

hub.OPEN_SECONDS = 0.0
try:
    hub.HubBucket("hf://buckets/me/name/run", endpoint="http://127.0.0.1:9")
except BucketUnavailable:
    pass
assert dict(os.environ) == before
assert get_session() is session and session.timeout.read is None
assert XetConfig().get("client.retry_base_delay").total_seconds() == 3.0
ours = xet._config()
assert ours.get("client.retry_max_attempts") == 7
assert ours.get("client.retry_base_delay").total_seconds() == 2.0
assert ours.get("chunk_cache.size_bytes") == 0
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_XET")}
    environment["HF_XET_CLIENT_RETRY_MAX_ATTEMPTS"] = "7"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
