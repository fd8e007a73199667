"""Have real vLLM engines make a trial's change in place, and compare their memory with that of a fresh load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubsync.errors import ReplicaUnsuitable

from .trial import Trial

_TAIL = 25

# What makes an engine of one model start fast; on a machine with accelerators vLLM ignores the CPU settings.
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # a function of ours travels to workers in other processes
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the checkpoint.

    Attributes:
        name: as in the checkpoint.
        kind: affine, table, relayout, dense, refused, or missing if no worker holds it. The worst of all workers.
        reason: why it is refused, or None.
        elements: that all workers hold, copies included.
    """

    name: str
    kind: str
    reason: str | None
    elements: int


@dataclass(frozen=True)
class Diagnosis:
    """What the engines showed.

    Attributes:
        tensors: of the checkpoint, in its order.
        derived: parameters of the served model that are computed from others, and computed again after a commit.
        ranks: workers.
        changed: elements of the checkpoint that the trial changed.
        compared: parameters and buffers, over all workers.
        wrong_after_commit, wrong_after_undo: those that differ from a fresh load of the patched and of the base
            checkpoint, as `rank: name`.
        error: what the workers refused with, `Type: message`; None if they did not.
        seconds: load, attach, stage, commit.
    """

    tensors: list[TensorReport]
    derived: list[str]
    ranks: int
    changed: int
    compared: int
    wrong_after_commit: list[str]
    wrong_after_undo: list[str]
    error: str | None
    seconds: dict[str, float]

    @property
    def exact(self) -> bool:
        return self.error is None and not self.wrong_after_commit and not self.wrong_after_undo


def examine(trial: Trial, options: Mapping[str, Any], workdir: Path) -> Diagnosis:
    """Run two engines, one after the other: one follows the trial, one loads its outcome.

    Args:
        options: of vLLM's `LLM`: parallel sizes, dtype, whatever changes the layout.

    Raises:
        ReplicaUnsuitable: an engine did not start; the message ends with what it printed.
    """
    target = {"version": trial.target.version, "digest": trial.target.digest}
    first = _run(trial, trial.base, options, target, workdir / "followed")
    fresh = _run(trial, trial.patched, options, None, workdir / "fresh") if first["error"] is None else None
    before = first["memory"]
    error = first["error"]
    return Diagnosis(
        tensors=_tensors(trial, first.get("layout", [])),
        derived=sorted({name for rank in first.get("layout", []) for name in rank.get("derived", [])}),
        ranks=len(before),
        changed=trial.changed,
        compared=sum(map(len, before)),
        wrong_after_commit=_different(first["followed"], fresh["memory"]) if fresh else [],
        wrong_after_undo=_different(first["undone"], before) if fresh else [],
        error=None if error is None else f"{error['type']}: {error['message']}",
        seconds={"load": first["load_s"], **first.get("seconds", {})},
    )


_WORST = ("missing", "affine", "table", "relayout", "dense", "refused")


def _tensors(trial: Trial, layouts: Sequence[Mapping[str, Any]]) -> list[TensorReport]:
    reports = []
    for spec in trial.table:
        found = [rank["tensors"][spec.name] for rank in layouts if spec.name in rank.get("tensors", {})]
        kind = max((row["class"] for row in found), key=_WORST.index, default="missing")
        reason = next((row["reason"] for row in found if row["reason"]), None)
        reports.append(TensorReport(spec.name, kind, reason, sum(row["elements"] for row in found)))
    return reports


def _different(left: Sequence[Mapping[str, str]], right: Sequence[Mapping[str, str]]) -> list[str]:
    """`rank: name` of everything that differs."""
    if len(left) != len(right):
        return [f"{len(left)} workers, and {len(right)} in the fresh engine"]
    return [
        f"rank {rank}: {name}"
        for rank, (ours, fresh) in enumerate(zip(left, right, strict=True))
        for name in sorted(ours.keys() | fresh.keys())
        if ours.get(name) != fresh.get(name)
    ]


def _run(
    trial: Trial, checkpoint: Path, options: Mapping[str, Any], target: dict[str, Any] | None, workdir: Path
) -> dict[str, Any]:
    workdir.mkdir()
    spec, report, log = workdir / "spec.json", workdir / "report.json", workdir / "log"
    spec.write_text(json.dumps({"checkpoint": str(checkpoint), "options": dict(options), "target": target}))
    environment = {**_ENVIRONMENT, **_binding(options), **os.environ}
    environment |= {"HUBSYNC_BUCKET": trial.address, "HUBSYNC_CACHE": str(workdir / "cache")}
    with log.open("wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "vllm_plugin.exam", str(spec), str(report)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    if done.returncode != 0 or not report.is_file():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
        raise ReplicaUnsuitable(
            f"vLLM ended with code {done.returncode} on {checkpoint}; the end of its output:\n{tail}"
        )
    answer: dict[str, Any] = json.loads(report.read_text())
    return answer


def _binding(options: Mapping[str, Any]) -> dict[str, str]:
    """vLLM for CPUs wants to be told which cores several workers get."""
    workers = int(options.get("tensor_parallel_size", 1)) * int(options.get("pipeline_parallel_size", 1))
    if workers == 1 or not hasattr(os, "sched_getaffinity"):
        return {}
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(cores[worker % len(cores)]) for worker in range(workers))}
