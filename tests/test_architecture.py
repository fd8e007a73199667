"""The rooms of docs/ARCHITECTURE.md, held by their imports: one way, and light where it is promised."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lower rooms first: a room may import itself and what stands on a lower line.
FLOORS = [
    {"hubsync.errors", "hubsync.cache", "hubsync.parallel"},
    {"hubsync.table", "hubsync.bits", "hubsync.keys"},
    {"hubsync.kernels"},
    {"hubsync.digest", "hubsync.patch", "hubsync.manifest"},
    {"hubsync.codec", "hubsync.checkpoint", "hubsync.bucket", "hubsync.localhub"},
    {"hubsync.parts", "hubsync.weights"},
    {"hubsync.chain"},
    {"hubsync.replica", "vllm_plugin"},
    {"hubsync.trainer"},
    {"hubsync.integrations", "hubsync.syncer"},
    {"hubsync.demo", "hubsync.doctor"},
    {"hubsync.cli"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

NEVER = {
    "hubsync.replica": {"torch", "vllm", "vllm_plugin", "trl", "transformers"},
    "hubsync.trainer": {"vllm", "vllm_plugin", "trl"},
    "hubsync.integrations": {"vllm", "vllm_plugin"},
    "hubsync.syncer": {"vllm", "vllm_plugin", "trl", "transformers"},
    "hubsync.doctor": {"vllm", "vllm_plugin", "trl"},
    "hubsync.chain": {"vllm", "trl", "transformers", "requests"},
    "vllm_plugin": {"trl", "transformers"},
}


def room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "vllm_plugin":
        return "vllm_plugin"
    if parts[0] == "hubsync" and len(parts) > 1:
        return f"hubsync.{parts[1]}"
    return None


def sources() -> list[Path]:
    return sorted([*ROOT.glob("hubsync/**/*.py"), *ROOT.glob("vllm_plugin/**/*.py")])


def imports(path: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, wherever in the file."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = list(package[: len(package) - node.level + 1]) if node.level else []
            stem = ".".join([*start, *([node.module] if node.module else [])])
            yield stem
            yield from (f"{stem}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    if room is None:  # the package itself only hands out names
        return
    used = set(imports(path))
    upwards = {name for name in used if FLOOR.get(room_of(name) or room, -1) > FLOOR[room]}
    sideways = {
        name for name in used if (other := room_of(name)) not in (None, room) and FLOOR.get(other, 0) == FLOOR[room]
    }
    forbidden = {name for name in used if name.split(".")[0] in NEVER.get(room, ())}
    assert not upwards | sideways | forbidden


@pytest.mark.parametrize(
    "statement",
    [
        "import hubsync",
        "from hubsync import DeltaWeightTransferEngine, SyncConfig",
        "import hubsync.chain, hubsync.replica.sync, hubsync.cli.main",
        "import vllm_plugin; vllm_plugin.register()",
    ],
)
def test_what_is_light_stays_light(statement: str) -> None:
    heavy = "{'vllm', 'trl', 'transformers', 'accelerate', 'datasets'}"
    code = (
        f"import sys; {statement}; sys.exit(str({heavy} & sys.modules.keys()) if {heavy} & sys.modules.keys() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_trainer_side_works_where_vllm_is_not_installed() -> None:
    """TRL looks for vllm with `find_spec`; an environment without it is one in which nobody finds it."""
    code = """
import importlib.util, sys

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.startswith("vllm") else find_spec(name, *rest)
sys.modules["vllm"] = None
from hubsync.integrations.trl import HubSyncCallback
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
