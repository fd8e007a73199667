"""Tests of Triton kernels: on a GPU if there is one, else in a process of their own with Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # must be set before Triton is imported

HERE = DEVICE == "cuda" or INTERPRETED
"""Whether kernels run in this process."""

ENGINE_OPTIONS: dict[str, Any] = {"gpu_memory_utilization": 0.06} if DEVICE == "cuda" else {}
"""Of every engine of a tiny model: tests have several at once on one GPU."""

SERVER_ARGUMENTS = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE_OPTIONS.items()]

on_device = pytest.mark.on_device
"""Mark of a test, or of a whole file, that launches kernels."""


def in_the_interpreter(file: str) -> Callable[[], None]:
    """A test that runs those of a file that launch kernels in the interpreter, where there is no GPU."""

    @pytest.mark.slow
    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
    @pytest.mark.skipif(HERE, reason="the kernels are tested in this process")
    def in_a_process() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "on_device", file]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-5000:]

    return in_a_process
