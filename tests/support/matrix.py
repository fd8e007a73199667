"""The table of docs/models.md: `make test-matrix` records a result for each model and layout, and prints them.

python -m tests.support.matrix           # print the results of the last run
python -m tests.support.matrix --write   # and write them to docs/models.md
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubsync.doctor.diagnosis import TensorReport
from hubsync.doctor.report import folded

_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "build" / "matrix"
_PAGE = _ROOT / "docs" / "models.md"
_TABLE = re.compile(r"(?<=<!-- make test-matrix -->\n).*?(?=<!-- end -->)", re.DOTALL)
_LAYOUTS = ("tp1", "tp2", "ep2")


def record(architecture: str, layout: str, answer: Mapping[str, Any]) -> None:
    """Keep the doctor's answer (`--json`, and the model's `class`) for the table."""
    _RESULTS.mkdir(parents=True, exist_ok=True)
    (_RESULTS / f"{architecture}.{layout}.json").write_text(json.dumps(answer))


def table() -> str:
    results: dict[str, dict[str, Any]] = {}
    for file in sorted(_RESULTS.glob("*.json")):
        name, layout, _ = file.name.split(".")
        results.setdefault(name, {})[layout] = json.loads(file.read_text())
    lines = [
        "| model | class | 1 worker | 2 workers | experts on 2 | tensors compared | loaded whole at each commit |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, layouts in results.items():
        verdicts = [_verdict(layouts.get(layout)) for layout in _LAYOUTS]
        first = _any(layouts)
        cells = [name, f"`{first['class']}`", *verdicts, str(first["compared"]), _whole(first)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _any(layouts: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(layouts[layout] for layout in _LAYOUTS if layout in layouts)
    return found


def _verdict(answer: Mapping[str, Any] | None) -> str:
    return "" if answer is None else "exact" if answer["exact"] else "not exact"


def _whole(answer: Mapping[str, Any]) -> str:
    reports = [TensorReport(**row) for row in answer["tensors"] if row["kind"] == "dense"]
    return ", ".join(dict.fromkeys(f"`{name.split('*.')[-1]}`" for name, _, _ in folded(reports)))


def main(write: bool) -> None:
    print(table())
    if write:
        _PAGE.write_text(_TABLE.sub(lambda _: table(), _PAGE.read_text()))


if __name__ == "__main__":
    main("--write" in sys.argv)
