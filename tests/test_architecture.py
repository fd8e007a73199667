"""The layers of docs/ARCHITECTURE.md: imports point one way, and light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lower layers first: a package may import itself and what stands on an earlier line.
LAYERS = [
    {"hubsync.errors", "hubsync.cache", "hubsync.progress", "hubsync.retry"},
    {"hubsync.kernels", "hubsync.localhub"},
    {"hubsync.format"},
    {"hubsync.bucket"},
    {"hubsync.chain"},
    {"hubsync.apply"},
    {"hubsync.replicas", "vllm_plugin"},
    {"hubsync.publish"},
    {"hubsync.integrations", "hubsync.lifecycle"},
    {"hubsync.demo", "hubsync.doctor", "hubsync.report"},
    {"hubsync.cli"},
    {"hubsync.__main__"},
]
LAYER = {package: level for level, packages in enumerate(LAYERS) for package in packages}

INFERENCE_ENGINES = {"vllm", "vllm_plugin"}
TRAINERS = {"trl", "transformers"}
NEVER = {
    "hubsync.apply": INFERENCE_ENGINES | TRAINERS,
    "hubsync.replicas": INFERENCE_ENGINES | TRAINERS | {"torch"},
    "hubsync.publish": INFERENCE_ENGINES | {"trl"},
    "hubsync.integrations": INFERENCE_ENGINES,
    "hubsync.lifecycle": INFERENCE_ENGINES | TRAINERS,
    "hubsync.doctor": INFERENCE_ENGINES | {"trl"},
    "hubsync.report": INFERENCE_ENGINES | TRAINERS,
    "hubsync.chain": INFERENCE_ENGINES | TRAINERS | {"requests"},
    "vllm_plugin": TRAINERS,
}
MAY_USE = {  # they implement interfaces of vLLM
    "hubsync/integrations/vllm_trainer.py": {"vllm"},
    "hubsync/integrations/verl_worker.py": {"vllm_plugin"},
}


def package_of(module: str) -> str | None:
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
    parents = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = list(parents[: len(parents) - node.level + 1]) if node.level else []
            stem = ".".join([*start, *([node.module] if node.module else [])])
            yield stem
            yield from (f"{stem}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = package_of(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    if package is None:  # the package itself only hands out names
        return
    used = set(imports(path))
    others = {name: other for name in used if (other := package_of(name)) not in (None, package)}
    allowed = MAY_USE.get(str(path.relative_to(ROOT)), set())
    not_below = {name for name, other in others.items() if LAYER.get(other, -1) >= LAYER[package]}
    forbidden = {name for name in used if name.split(".")[0] in NEVER.get(package, set()) - allowed}
    assert not not_below | forbidden


@pytest.mark.parametrize(
    "statement",
    [
        "import hubsync",
        "from hubsync import DeltaWeightTransferEngine, SyncConfig",
        "import hubsync.chain, hubsync.replicas.replica, hubsync.cli.main",
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
    """TRL detects vllm with `find_spec`, so hiding it from `find_spec` simulates an environment without it."""
    code = """
import importlib.util, sys

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.startswith("vllm") else find_spec(name, *rest)
sys.modules["vllm"] = None
from hubsync.integrations.trl import HubSyncCallback
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- sizes and names ---------------------------------------------------------------------------------


def definitions(*kinds: type[ast.AST]) -> Iterator[tuple[Path, ast.AST]]:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kinds):
                yield path, node


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    compilers = ("jit", "intrinsic", "compiled")
    return any(compiler in ast.unparse(decorator) for decorator in function.decorator_list for compiler in compilers)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of the parameters; keyword-only ones of constructors do not count."""
    arguments = function.args
    keywords = [] if function.name == "__init__" else arguments.kwonlyargs
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *keywords)]
    return [name for name in names if name not in ("self", "cls")]


def test_no_product_file_is_above_the_limit_of_450_lines() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert {path: size for path, size in sizes.items() if size > 450} == {}


def test_no_function_is_above_the_limit_of_60_lines_or_7_parameters() -> None:
    excess = {}
    for path, function in definitions(ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        if is_kernel(function):
            continue
        lines = function.end_lineno - function.lineno + 1
        count = len(parameters(function))
        if lines > 60 or count > 7:
            excess[f"{path.relative_to(ROOT)}:{function.name}"] = (lines, count)
    assert excess == {}


def test_no_two_classes_are_named_alike() -> None:
    names = Counter(node.name for _, node in definitions(ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []
