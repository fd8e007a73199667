"""The doctor's report as text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby

from rich.console import Console
from rich.table import Table

from .diagnosis import Diagnosis, TensorReport
from .environment import CHANGE, Finding

_MAX_NAMES = 10

_EXPLAINED = {
    "affine": "strided slices of the checkpoint's tensor; changed in place",
    "table": "mapped element by element; changed in place",
    "relayout": "permuted by vLLM after loading; changed in place",
    "dense": "reloaded whole at each commit",
    "refused": "cannot be synced exactly",
    "missing": "held by no worker",
}


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print how each tensor lies in memory, what was compared, and the verdict."""
    console = Console(highlight=False, markup=False)
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
            console.print(f"{report.kind} {report.name}: {report.reason}")
    if diagnosis.derived:
        console.print(f"recomputed after each commit: {', '.join(diagnosis.derived)}")
    if diagnosis.error is not None:
        console.print(f"\nNo. {diagnosis.error}")
        return
    seconds = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in diagnosis.seconds.items())
    console.print(f"{diagnosis.changed:,} elements changed in place; {seconds}")
    _print_comparison(console, diagnosis)


def next_steps(diagnosis: Diagnosis, serve: str) -> list[str]:
    """What to do after a diagnosis.

    Args:
        serve: a command that serves the model as it was examined.
    """
    if diagnosis.exact:
        return [
            "Next: serve it with the options that were examined,",
            f"  {serve}",
            "and publish to the same address: SyncConfig(bucket=ADDRESS), README.md has examples.",
            "Examine it again with another layout (--tensor-parallel-size, ...) or another vLLM before you use that.",
        ]
    if diagnosis.error is None:
        return [
            "Next: do not sync this model in this layout: its weights would differ. Report it with the output of",
            "--json, and try --tensor-parallel-size 1, or a tested vLLM (`hubsync doctor --environment`).",
        ]
    whole = "HUBSYNC_DENSE_FALLBACK" in serve
    if not whole and any(report.kind == "refused" for report in diagnosis.tensors):
        return [
            "Next: run this again with --dense-fallback, which loads them whole at each commit. If that is exact,",
            "start servers with HUBSYNC_DENSE_FALLBACK=1. docs/models.md lists models that need it.",
        ]
    return [
        "Next: change what the message says, and run this again. `hubsync doctor --environment` checks the installed",
        "versions; docs/operations.md has the remedies of refusals.",
    ]


def print_environment(findings: list[Finding]) -> None:
    """Print every finding, and what to change."""
    console = Console(highlight=False, markup=False)
    table = Table()
    for column in ("", "found", "tested with", "verdict"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(finding.name, finding.found or "-", finding.tested, finding.verdict)
    console.print(table)
    for finding in findings:
        if finding.advice:
            console.print(f"{finding.name}: {finding.advice}", soft_wrap=True)
    if all(finding.verdict != CHANGE for finding in findings):
        console.print("Nothing must be changed. Next: hubsync doctor MODEL_DIR")


def _print_comparison(console: Console, diagnosis: Diagnosis) -> None:
    for wrong, reference in (
        (diagnosis.wrong_after_commit, "a fresh load of the patched checkpoint"),
        (diagnosis.wrong_after_undo, "the original weights after the undo"),
    ):
        same = diagnosis.compared - len(wrong)
        console.print(f"{same} of {diagnosis.compared} tensors of the served model equal {reference}, bit for bit")
        for name in wrong[:_MAX_NAMES]:
            console.print(f"  differs: {name}")
        if len(wrong) > _MAX_NAMES:
            console.print(f"  and {len(wrong) - _MAX_NAMES} more; --json lists all")
    if diagnosis.exact:
        console.print("\nYes: this model can be synced exactly.")
    else:
        console.print("\nNo: please report this, with the model's config.json and the versions of vLLM and hubsync.")


def folded(reports: Iterable[TensorReport]) -> list[tuple[str, str, list[TensorReport]]]:
    """Group tensors that differ only in layer and expert numbers: (name with * for the numbers, class, tensors)."""

    def key(report: TensorReport) -> tuple[str, str]:
        return re.sub(r"(?<=\.)\d+(?=\.)", "*", report.name), report.kind

    return [(*shared, list(group)) for shared, group in groupby(sorted(reports, key=key), key)]
