"""`hubsync doctor`: will my model work?"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hubsync.errors import ConfigError

if TYPE_CHECKING:
    from hubsync.doctor.exam import Diagnosis, TensorReport

_EXPLAINED = {
    "affine": "slices of rows and columns",
    "table": "element by element",
    "relayout": "permuted by vLLM after loading; followed",
    "dense": "loaded whole at each commit",
    "refused": "cannot be followed exactly",
    "missing": "held by no worker",
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="will my model work? load it as vLLM would, change it in place, and compare every byte with a fresh load",
        description="Loads the model as vLLM would, says how each of its tensors lies in memory, applies a random 1 % "
        "delta in place, compares every parameter and buffer bit for bit with a fresh load of the patched checkpoint, "
        "takes it back and compares again. Exit code 0: exact. 1: a mismatch, or a refusal, with the reason.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a checkpoint in safetensors files")
    parser.add_argument("--random", action="store_true", help="MODEL_DIR needs only a config.json: make random weights")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--pipeline-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--enable-expert-parallel", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", help="what vLLM serves (default bfloat16)")
    parser.add_argument("--max-model-len", type=int, default=256, help="of the examined engines (default 256)")
    parser.add_argument("--attention-backend", metavar="NAME", help="as for vllm serve, e.g. CPU_MLA")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument(
        "--dense-fallback", action="store_true", help="load tensors whole that cannot be followed, as a server may"
    )
    parser.add_argument(
        "--workdir", type=Path, help="where the patched copy of the checkpoint goes (default: a temporary directory)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed here, and the doctor examines vLLM: pip install vllm")
    from hubsync.doctor.exam import examine
    from hubsync.doctor.trial import make_random_checkpoint, make_trial

    with TemporaryDirectory(dir=args.workdir, prefix="hubsync-doctor-") as name:
        workdir = Path(name)
        base = make_random_checkpoint(args.model, workdir / "random") if args.random else args.model.resolve()
        diagnosis = examine(make_trial(base, workdir), _options(args), workdir)
    if args.json:
        print(json.dumps({"exact": diagnosis.exact, **asdict(diagnosis)}, indent=2))
    else:
        _print(diagnosis)
    return 0 if diagnosis.exact else 1


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Of vLLM's `LLM`."""
    options: dict[str, Any] = {
        "tensor_parallel_size": args.tensor_parallel_size,
        "pipeline_parallel_size": args.pipeline_parallel_size,
        "enable_expert_parallel": args.enable_expert_parallel,
        "dtype": args.dtype,
        "max_model_len": args.max_model_len,
        "max_num_seqs": 4,
        "enforce_eager": True,
        "trust_remote_code": args.trust_remote_code,
    }
    if args.attention_backend:
        options["attention_backend"] = args.attention_backend
    if args.dense_fallback:
        options["additional_config"] = {"hubsync": {"dense_fallback": True}}
    return options


def _print(diagnosis: Diagnosis) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=f"{len(diagnosis.tensors)} tensors on {diagnosis.ranks} worker(s)")
    for column in ("tensors", "", "class"):
        table.add_column(column, overflow="fold")
    for pattern, kind, reports in folded(diagnosis.tensors):
        table.add_row(pattern, f"x{len(reports)}" if len(reports) > 1 else "", kind)
    console.print(table)
    for kind in dict.fromkeys(report.kind for report in diagnosis.tensors):
        console.print(f"{kind}: {_EXPLAINED[kind]}")
    for report in diagnosis.tensors:
        if report.reason is not None:
            console.print(f"{report.kind} {report.name}: {report.reason}", markup=False)
    if diagnosis.derived:
        console.print(f"computed again after a commit: {', '.join(diagnosis.derived)}", markup=False)
    if diagnosis.error is not None:
        console.print(f"\nNo. {diagnosis.error}", markup=False)
        return
    took = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in diagnosis.seconds.items())
    console.print(f"{diagnosis.changed:,} elements changed in place; {took}")
    _print_comparison(console, diagnosis)


def _print_comparison(console: Any, diagnosis: Diagnosis) -> None:
    for wrong, what in (
        (diagnosis.wrong_after_commit, "a fresh load of the patched checkpoint"),
        (diagnosis.wrong_after_undo, "the weights before, after the change was taken back"),
    ):
        same = diagnosis.compared - len(wrong)
        console.print(f"{same} of {diagnosis.compared} parameters and buffers equal {what}, bit for bit")
        for name in wrong[:10]:
            console.print(f"  differs: {name}", markup=False)
    if diagnosis.exact:
        console.print("\nYes: this model can be followed exactly.")
    else:
        console.print("\nNo: please report this, with the model's config.json and the versions of vLLM and hubsync.")


def folded(reports: Iterable[TensorReport]) -> list[tuple[str, str, list[TensorReport]]]:
    """(name with * for layer and expert numbers, class, tensors) of tensors that differ in those numbers only."""

    def key(report: TensorReport) -> tuple[str, str]:
        return re.sub(r"(?<=\.)\d+(?=\.)", "*", report.name), report.kind

    return [(*shared, list(group)) for shared, group in groupby(sorted(reports, key=key), key)]
