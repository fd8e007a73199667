"""Fuzzing of documents with atheris: libFuzzer keeps each input that reaches new lines, and mutates it further.

atheris ends its process, so it runs in a child.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

_LONGEST = 16_000  # bytes of an input


def run(runs: int, seconds: float, seed: int, keep: Path) -> int:
    """Run a child, and print what it reports. Returns 0, or 1 after a failure."""
    keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hubsync-fuzz-") as name:
        report = Path(name, "report.json")
        words = [sys.executable, "-m", __name__, str(report), str(keep), str(keep / "corpus"), str(seed)]
        libfuzzer = [f"-runs={runs}", f"-max_total_time={seconds:.0f}", f"-seed={seed + 1}", f"-max_len={_LONGEST}"]
        done = subprocess.run([*words, *libfuzzer, "-verbosity=0", f"-artifact_prefix={keep}/"], check=False)
        if not report.exists():
            print("documents: the fuzzer did not start", file=sys.stderr)
            return 1
        found = json.loads(report.read_text())
    print(f"documents, guided by coverage: {found['summary']}")
    return 1 if done.returncode or found["failures"] else 0


def _compiled_modules() -> list[str]:
    """Modules with functions that numba compiles: it knows nothing of atheris."""
    root = Path(__file__).parents[2]
    files = [
        path for path in (root / "hubsync").rglob("*.py") if re.search("@(compiled|njit|intrinsic)", path.read_text())
    ]
    return [".".join(path.relative_to(root).with_suffix("").parts) for path in files]


def _child(report: Path, keep: Path, corpus: Path, seed: int, libfuzzer: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["hubsync"], exclude=_compiled_modules()):
        from . import documents
    from .session import Session

    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(documents.seeds()):
        (corpus / f"seed-{number}").write_bytes(content)
    documents.warm_up()
    session = Session(documents.read, documents.REJECTIONS, keep)

    def one(data: bytes) -> None:
        session.one(data)
        if session.executions % 1000 == 0 or session.failures:
            report.write_text(session.to_json())

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        if number % 4 == 0:
            return atheris.Mutate(data, max_size)
        return documents.mutate(data, Random(f"{seed} {number}"))[:max_size]

    atheris.Setup([sys.argv[0], str(corpus), *libfuzzer], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    _child(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
