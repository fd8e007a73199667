"""Settings: types, choices, and command line arguments."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.apply.protocol import KV_POLICIES
from hubsync.errors import (
    ConfigError,
)
from tests.support.tiny import Tiny


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"bucket": ""}, "needs a bucket"),
        ({"view_dtype": "bf16"}, "view_dtype must be one of bfloat16"),
        ({"encoding": "zip"}, "encoding must be one of fast, compact"),
        ({"kv_cache": "drop"}, "kv_cache must be one of"),
        ({"snapshot_device": "cuda:0"}, "snapshot_device must be one of"),
        ({"anchor_every": -1}, "anchor_every"),
        ({"anchor_fraction": -0.5}, "anchor_fraction"),
        ({"anchor_fraction": float("nan")}, "anchor_fraction"),
        ({"stage_timeout": 0}, "positive"),
        ({"stage_timeout": float("nan")}, "positive"),
        ({"commit_timeout": float("inf")}, "positive"),
        ({"servers": "http://one"}, "servers must be a list"),
        ({"servers": [8000]}, "servers must be a list"),
        ({"servers": None}, "servers must be a list"),
        ({"anchor_fraction": "half"}, "anchor_fraction must be float, not 'half'"),
        ({"anchor_fraction": True}, "anchor_fraction must be float, not True"),
        ({"name": 1.5}, "name must be str or None, not 1.5"),
        ({"servers": ["http://one", "http://one/"]}, "twice"),
        ({"bucket": None}, "bucket must be str"),
        ({"anchor_every": "3"}, "anchor_every must be int"),
        ({"anchor_every": True}, "anchor_every must be int"),
        ({"resume": "no"}, "resume must be bool"),
        ({"name": 20261123}, "name must be str"),
        ({"servers": ["http://one"], "quorum": 2}, "quorum must be 0"),
        ({"servers": ["localhost:8000"]}, "http://localhost:8000"),
        ({"servers": ["sgl://one"]}, "no inference engine for sgl:// is installed"),
        ({"name": "two\nlines"}, "printable"),
        ({"base_revision": "abc"}, "base_model"),
    ],
)
def test_an_invalid_setting_is_refused_with_its_reason(setting: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SyncConfig(**{"bucket": "somewhere", **setting})


def test_paths_may_be_path_objects() -> None:
    assert SyncConfig(bucket=Path("runs/1")) == SyncConfig(bucket="runs/1")  # type: ignore[arg-type]
    assert SyncConfig(bucket="x", base_model=Path("base")).base_model == "base"  # type: ignore[arg-type]


def test_hf_argument_parser_makes_a_config() -> None:
    parser = pytest.importorskip("transformers").HfArgumentParser(SyncConfig)
    (config,) = parser.parse_args_into_dataclasses(
        ["--bucket", "runs/1", "--servers", "http://a:1", "http://b:2", "--anchor_every", "10", "--resume", "False"]
    )
    assert config == SyncConfig(bucket="runs/1", servers=["http://a:1", "http://b:2"], anchor_every=10, resume=False)


def test_trl_parser_reads_yaml_and_rejects_other_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = pytest.importorskip("trl").TrlParser([SyncConfig])
    settings = tmp_path / "config.yaml"
    settings.write_text("bucket: runs/1\nanchor_fraction: 1\nencoding: compact\n")
    (config,) = parser.parse_args_and_config(["--config", str(settings), "--kv_cache", "keep"])
    assert config == SyncConfig(bucket="runs/1", anchor_fraction=1, encoding="compact", kv_cache="keep")
    with pytest.raises(SystemExit):
        parser.parse_args_and_config(["--bucket", "runs/1", "--encoding", "zip"])
    assert "invalid choice: 'zip'" in capsys.readouterr().err


def test_every_setting_has_the_docstrings_text_as_help() -> None:
    helps = {setting.name: setting.metadata["help"] for setting in fields(SyncConfig)}
    assert [name for name, text in helps.items() if len(text) < 30] == []
    assert helps["name"] == "Free text recorded with every version, shown by `hubsync ls`."


def test_kv_cache_choices_are_those_of_the_worker_protocol() -> None:
    assert get_args(get_type_hints(SyncConfig)["kv_cache"]) == KV_POLICIES


def test_an_unknown_bucket_scheme_is_refused(model: Tiny) -> None:
    with pytest.raises(ConfigError, match="not a bucket address"):
        DeltaWeightTransferEngine(model, None, SyncConfig(bucket="s3://somewhere"))
