"""Checkpoint views as lazy mappings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hubsync.errors import ConfigError, FormatError
from hubsync.format.checkpoint import Checkpoint, Patched, is_checkpoint
from hubsync.format.patch import TensorDelta
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.kernels.bits import bits_of
from tests.support.toy import TABLE, nudged, patch_between, view


def test_only_the_files_of_the_index_count(tmp_path: Path) -> None:
    tensors = view(0)
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:3]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[3:]}, tmp_path / "model-00002-of-00002.safetensors")
    save_file(view(1), tmp_path / "consolidated.safetensors")
    shards = {name: f"model-0000{1 if name in names[:3] else 2}-of-00002.safetensors" for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    checkpoint = Checkpoint(tmp_path, TABLE)
    assert list(checkpoint) == names
    for name in names:
        assert np.array_equal(bits_of(checkpoint[name]), bits_of(tensors[name]))


def test_tensors_outside_the_table_are_ignored(tmp_path: Path) -> None:
    table = TensorTable([TensorSpec("a", (2,), "F32")])
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, table)
    assert list(checkpoint) == ["a"]
    with pytest.raises(KeyError):
        checkpoint["b"]


def test_a_wider_checkpoint_is_rounded_like_version_0(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 1.00390625, 1.01171875, 3.4e38])  # the two in the middle are ties between bf16 numbers
    save_file({"a": values}, tmp_path / "model.safetensors")
    rounded = Checkpoint(tmp_path, TensorTable([TensorSpec("a", (4,), "BF16")]))["a"]
    assert rounded.dtype == torch.bfloat16
    assert rounded.tolist() == [1.0, 1.0, 1.015625, float("inf")]


def test_a_directory_without_weights_is_not_a_checkpoint(tmp_path: Path) -> None:
    assert not is_checkpoint(tmp_path / "missing")
    assert not is_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert is_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("model.safetensors", "not a safetensors file"),
        ("model.safetensors.index.json", "{"),
        ("model.safetensors.index.json", "[]"),
        ("model.safetensors.index.json", '{"weight_map": {"q": 5}}'),
        ("model.safetensors.index.json", '{"weight_map": {"q": "missing.safetensors"}}'),
    ],
)
def test_a_damaged_checkpoint_names_the_file(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=r"model.safetensors|missing\.safetensors"):
        Checkpoint(tmp_path, TABLE)


def test_patching_a_view_returns_the_new_view_and_keeps_the_old_one() -> None:
    old = view(0)
    new = nudged(old, 1)
    before = {name: tensor.clone() for name, tensor in old.items()}
    patched = Patched(old, TABLE, patch_between(old, new))
    for name in patched:
        assert np.array_equal(bits_of(patched[name]), bits_of(new[name]))
        assert np.array_equal(bits_of(old[name]), bits_of(before[name]))


def test_a_delta_beyond_the_tensor_is_refused() -> None:
    tensors = view(0)
    patch = patch_between(tensors, nudged(tensors, 1))
    delta = patch[1]
    patch[1] = TensorDelta(delta.indices + 8 * 8, delta.diffs)
    with pytest.raises(FormatError, match="q has 64 elements"):
        Patched(tensors, TABLE, patch)["q"]
