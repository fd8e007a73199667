"""Apply a trial's delta in a real vLLM engine, and compare the engine's memory with a fresh load."""

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
from hubsync.progress import note

from .trial import Trial

_TAIL = 25

# Settings with which an engine starts fast. On a machine with accelerators vLLM ignores the CPU settings.
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `collective_rpc` pickles a function for workers in other processes
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the checkpoint.

    Attributes:
        name: name in the checkpoint.
        kind: affine, table, relayout, dense, refused, or missing if no worker holds it; the worst over all workers.
        reason: why the tensor is refused, or None.
        elements: number of elements that all workers hold, copies included.
    """

    name: str
    kind: str
    reason: str | None
    elements: int


@dataclass(frozen=True)
class Diagnosis:
    """Outcome of a trial.

    Attributes:
        tensors: tensors of the checkpoint, in its order.
        derived: parameters of the served model that are computed from others, and recomputed after each commit.
        ranks: number of workers.
        changed: number of elements that the trial changed.
        compared: number of tensors that the served models reach, over all workers.
        wrong_after_commit: tensors that differ from a fresh load of the patched checkpoint, as
            `rank N: name`.
        wrong_after_undo: the same for the base checkpoint, after the undo.
        error: error of the workers, `Type: message`, or None.
        seconds: duration of load, attach, stage and commit.
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
    """Run two engines, one after the other: the first applies the trial's delta, the second loads the patched model.

    Args:
        options: arguments of vLLM's `LLM`: parallel sizes, dtype, and whatever else changes the layout.
        workdir: existing directory for logs, caches and reports.

    Raises:
        ReplicaUnsuitable: an engine did not start; the message ends with its output.
    """
    target = {"version": trial.target.version, "digest": trial.target.digest}
    note("an engine loads the model, follows the delta and undoes it (minutes for a large model)")
    first = _run(trial, trial.base, options, target, workdir / "followed")
    if first["error"] is None:
        note("a fresh engine loads the patched checkpoint, to compare every tensor")
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
    """`rank N: name` of everything that differs."""
    if len(left) != len(right):
        return [f"{len(left)} workers here, {len(right)} in the fresh engine"]
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
    code = _finished([sys.executable, "-m", "vllm_plugin.exam", str(spec), str(report)], environment, log)
    if code != 0 or not report.is_file():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
        raise ReplicaUnsuitable(f"vLLM ended with code {code} on {checkpoint}; the end of its output:\n{tail}")
    answer: dict[str, Any] = json.loads(report.read_text())
    return answer


def _finished(command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """Run a command and return its exit code. Its output goes to `log`."""
    with log.open("wb") as output:
        done = subprocess.run(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    return done.returncode


def _binding(options: Mapping[str, Any]) -> dict[str, str]:
    """Cores of each worker; vLLM for CPUs needs them set if there are several workers."""
    workers = int(options.get("tensor_parallel_size", 1)) * int(options.get("pipeline_parallel_size", 1))
    if workers == 1 or not hasattr(os, "sched_getaffinity"):
        return {}
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(cores[worker % len(cores)]) for worker in range(workers))}
