"""Follow one changed element from `optimizer.step()` to the committed weight, and count the files that handle it.

A profile hook sees every Python call of the trainer's threads and of a worker in the same process. A file handles the
change if a function of it creates or returns the change, or takes it and hands it on to another file. The change is
recognised by its size: arrays with one entry for each changed element, and the files and bytes that encode them.
Checks that only read it (digests, hashes) do not hand it on.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from hubsync import DeltaWeightTransferEngine, SyncConfig
from hubsync.apply.engine import ModelHost, RunSource
from hubsync.apply.protocol import BUSY
from hubsync.apply.served_model import ServedModel
from hubsync.apply.session import Session

ROOT = Path(__file__).parents[1]
PRODUCT = tuple(f"{ROOT / package}/" for package in ("hubsync", "vllm_plugin"))

PATH = [
    "hubsync/publish/detect/sliced.py",
    "hubsync/publish/detect/recorder.py",
    "hubsync/publish/detect/changes.py",
    "hubsync/publish/publisher.py",
    "hubsync/format/parts.py",
    "hubsync/format/codec/encode.py",
    "hubsync/format/codec/grid.py",
    "hubsync/chain/part_files.py",
    "hubsync/bucket/local.py",
    "hubsync/chain/reader.py",
    "hubsync/format/codec/decode.py",
    "hubsync/apply/applier.py",
    "hubsync/apply/regions.py",
    "hubsync/kernels/bits.py",
    "hubsync/apply/memory.py",
]
"""The files, in reading order. docs/ARCHITECTURE.md explains each."""

INLINED = ("<listcomp>", "<dictcomp>")  # calls of their own only before Python 3.12
THREAD_POOL = "hubsync/kernels/parallel.py"  # runs functions of other files


class Policy(torch.nn.Module):
    """One matrix, so that the number of changed elements identifies the change."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(64, 64))

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            parameters[name].data.copy_(tensor)
        return set(parameters)


class Tracer:
    """Collects the product files that handle a change of `changed` elements, while `active`."""

    def __init__(self, changed: int):
        self.changed = changed
        self.active = False
        self.files: set[str] = set()
        self._takes: set[str] = set()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Sees this thread, and threads that start inside."""
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _profile(self, frame: FrameType, event: str, result: Any) -> None:
        if not self.active or event not in ("call", "return") or not _is_product(frame):
            return
        code, file = frame.f_code, frame.f_code.co_filename
        if event == "return":
            if self._carries(result) and code.co_name not in INLINED:
                self.files.add(file)
            return
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if any(self._carries(frame.f_locals.get(name)) for name in arguments if name != "self"):
            self._takes.add(file)
            caller = _product_caller(frame)
            if caller is not None and caller != file and caller in self._takes:
                self.files.add(caller)

    def _carries(self, value: Any, depth: int = 0) -> bool:
        if isinstance(value, (torch.Tensor, np.ndarray)):
            return len(value) == self.changed if value.ndim else False
        if isinstance(value, Path):
            return value.suffix == ".safetensors"
        if isinstance(value, (bytes, memoryview)):
            return len(value) > self.changed and b"hubsync-delta" in bytes(value[:400])
        if depth > 3:
            return False
        if isinstance(value, dict):
            parts = list(value.values())
        elif isinstance(value, (list, tuple)):
            parts = list(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
        else:
            return False
        return any(self._carries(part, depth + 1) for part in parts[:5])


def _is_product(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(PRODUCT)


def _product_caller(frame: FrameType) -> str | None:
    caller = frame.f_back
    while caller is not None and not _is_product(caller):
        caller = caller.f_back
    return None if caller is None else caller.f_code.co_filename


def _changes_of_a_step(policy: Policy) -> int:
    """How many bf16 elements the next step of AdamW changes."""
    twin = copy.deepcopy(policy)
    assert policy.weight.grad is not None
    twin.weight.grad = policy.weight.grad.clone()
    torch.optim.AdamW(twin.parameters(), lr=1e-4).step()
    return int((twin.weight.bfloat16() != policy.weight.bfloat16()).sum())


def _settled(session: Session) -> str:
    deadline = time.monotonic() + 60
    while session.state in BUSY:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return session.state


def test_a_changed_element_passes_through_at_most_fifteen_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy, served = Policy(), Policy().bfloat16()
    served.load_state_dict(policy.state_dict())
    policy.weight.grad = torch.randn(64, 64)
    tracer = Tracer(_changes_of_a_step(policy))
    source = RunSource(str(tmp_path / "run"), tmp_path / "cache")

    with tracer.installed():
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
        session = Session(ServedModel(lambda: ModelHost(source, (served,), torch.device("cpu"))))
        with DeltaWeightTransferEngine(policy, optimizer, SyncConfig(bucket=source.bucket)) as engine:
            session.attach()
            assert _settled(session) == "ready"
            tracer.active = True
            optimizer.step()
            position = engine.publish().result().position
            session.stage(position)
            assert _settled(session) == "staged"
            session.commit(position)
            tracer.active = False
    assert torch.equal(served.weight, policy.weight.bfloat16())

    found = {str(Path(file).relative_to(ROOT)) for file in tracer.files} - {THREAD_POOL}
    assert found == set(PATH)
    assert len(PATH) <= 15


def test_the_architecture_page_names_every_file_on_the_path() -> None:
    page = (ROOT / "docs/ARCHITECTURE.md").read_text()
    assert [file for file in PATH if file.removeprefix("hubsync/") not in page] == []
