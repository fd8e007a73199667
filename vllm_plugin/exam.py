"""Subprocess of `hubsync doctor`: one vLLM engine loads a checkpoint, optionally follows one version, and reports.

    python -m vllm_plugin.exam SPEC.json REPORT.json

SPEC: `checkpoint` (directory), `options` (of vLLM's `LLM`) and `target` (`version` and `digest` to go to, or null).
REPORT: `memory`, a hash of every tensor that a model reaches, for each rank by name; `error`, or null. With a target
also `layout` (of each rank, as `hubsync_layout` answers), `followed` and `undone` (`memory` after the commit and after
it was undone), and `seconds` of the phases. Bucket and cache come from the environment, as in a server.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from hubsync.apply.protocol import BUSY, WorkerMethod, WorkerState

_TIMEOUT_S = 3600.0


def memory_of(worker: Any) -> dict[str, str]:
    """Hash of every tensor that the worker's model, and its draft model, can reach."""
    import torch

    from .reachable import reachable_tensors

    runner = worker.model_runner
    draft = runner.get_draft_model() if hasattr(runner, "get_draft_model") else None
    models = {"": runner.get_model(), **({"draft.": draft} if draft is not None else {})}
    hashes = {}
    for prefix, model in models.items():
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in (*reachable_tensors(model), *named):
            if tensor.is_meta or tensor.layout != torch.strided:
                continue
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            hashes[prefix + name] = hashlib.blake2b(flat.cpu().numpy(), digest_size=16).hexdigest()
    return hashes


def _has_tokenizer(checkpoint: Path) -> bool:
    """vLLM needs one to start a vision-language model, and the exam of other models needs none."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json")
    return any((checkpoint / name).is_file() for name in names)


class _Refused(Exception):
    """A worker has answered with an error."""


class _Engine:
    def __init__(self, checkpoint: str, options: dict[str, Any]):
        from vllm import LLM

        self._llm = LLM(
            model=checkpoint,
            worker_extension_cls="vllm_plugin.DeltaWorkerExtension",
            skip_tokenizer_init=not _has_tokenizer(Path(checkpoint)),
            **options,
        )

    def ask(self, method: Any, *args: Any) -> list[Any]:
        """Every worker's answer; _Refused with the first error."""
        answers = self._llm.collective_rpc(method, args=args)
        errors = [
            answer["error"]
            for answer in answers
            if isinstance(answer.get("error"), dict) and answer.get("state") != WorkerState.POISONED
        ]
        if errors:
            raise _Refused(errors[0])
        return answers

    def settled(self, *expected: str) -> None:
        """Wait until no worker is busy; _Refused unless all are in one of the expected states."""
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            statuses = self.ask(WorkerMethod.STATUS)
            if not any(status["state"] in BUSY for status in statuses):
                break
            if time.monotonic() > deadline:
                raise _Refused({"type": "ReplicaUnsuitable", "message": f"still {statuses[0]['state']}; see the log"})
            time.sleep(0.01)
        for status in statuses:
            if status["state"] not in expected:
                if isinstance(status.get("error"), dict):
                    raise _Refused(status["error"])
                raise _Refused({"type": "ReplicaRefused", "message": f"a worker is {status['state']}; see the log"})

    def attach(self, report: dict[str, Any]) -> None:
        self.ask(WorkerMethod.ATTACH)
        self.settled(WorkerState.MAPPED, WorkerState.READY, WorkerState.POISONED)
        report["layout"] = self.ask(WorkerMethod.LAYOUT)
        if len(report["layout"]) > 1:
            self.ask(WorkerMethod.JOIN)
        self.settled(WorkerState.READY, WorkerState.POISONED)
        if any(status["state"] == WorkerState.POISONED for status in self.ask(WorkerMethod.STATUS)):
            self.ask(WorkerMethod.HEAL)  # it loaded values of another precision than the run's
            self.settled(WorkerState.READY)
            report["memory"] = self.ask(memory_of)

    def follow(self, version: int, digest: str, report: dict[str, Any]) -> None:
        seconds = report["seconds"] = {}
        started = time.perf_counter()
        self.attach(report)
        seconds["attach"], started = time.perf_counter() - started, time.perf_counter()
        self.ask(WorkerMethod.STAGE, version, digest)
        self.settled(WorkerState.STAGED)
        seconds["stage"], started = time.perf_counter() - started, time.perf_counter()
        self.ask(WorkerMethod.COMMIT, version, digest)
        seconds["commit"] = time.perf_counter() - started
        self.settled(WorkerState.READY)  # the digest of all live weights is right
        report["followed"] = self.ask(memory_of)
        self.ask(WorkerMethod.UNDO)
        self.settled(WorkerState.READY)
        report["undone"] = self.ask(memory_of)


def main(spec_file: str, report_file: str) -> None:
    spec = json.loads(Path(spec_file).read_text())
    report: dict[str, Any] = {"error": None}
    started = time.perf_counter()
    engine = _Engine(spec["checkpoint"], spec["options"])
    report["load_s"] = time.perf_counter() - started
    report["memory"] = engine.ask(memory_of)
    try:
        if spec["target"] is not None:
            engine.follow(spec["target"]["version"], spec["target"]["digest"], report)
    except _Refused as refused:
        report["error"] = refused.args[0]
        if "layout" not in report:
            report["layout"] = engine._llm.collective_rpc(WorkerMethod.LAYOUT)
    Path(report_file).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
