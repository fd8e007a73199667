"""vLLM servers forked from a process that has imported vLLM already.

The import takes 15 s of CPU in each of the up to four processes of a server: most of the time that tests took.
Everything after the import is vLLM's own. `hubsync demo` and the tests of isolated hosts start servers from nothing. So
do all tests on a GPU: CUDA does not survive a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hubsync.demo.serving import ServerProcess

from .on_gpu import DEVICE

# What the processes of a server import: the API server, the engine, a worker for CPUs, and models of the tests.
_MODULES = (
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen3",
)
_PR_SET_PDEATHSIG = 1
_TIMEOUT_S = 900.0


class WarmServerProcess(ServerProcess):
    """A `ServerProcess` that is forked. Its first instance in a process pays for the import."""

    def _launch(self, command: list[str], environment: dict[str, str]) -> Any:
        if DEVICE == "cuda":
            return super()._launch(command, environment)
        assert command[:2] == [sys.executable, "-m"]
        return _Forked(_launcher(), command[2], command[3:], environment, self.log)


def run_warm(command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """Run `python -m MODULE ARGUMENTS` in a process that is forked. Returns its exit code."""
    assert list(command[:2]) == [sys.executable, "-m"]
    if DEVICE == "cuda":
        with log.open("wb") as output:
            done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=_TIMEOUT_S)
        return done.returncode
    return _Forked(_launcher(), command[2], list(command[3:]), dict(environment), log).wait(_TIMEOUT_S)


@cache
def _launcher() -> _Launcher:
    return _Launcher()


class _Launcher:
    """The process that forks servers. It ends with this process, and its servers end with it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class _Forked:
    """What `ServerProcess` uses of a `subprocess.Popen`."""

    def __init__(
        self, launcher: _Launcher, module: str, arguments: list[str], environment: dict[str, str], log: Path
    ) -> None:
        self._launcher = launcher
        self._code: int | None = None
        self.pid = launcher.ask(module=module, arguments=arguments, environment=environment, log=str(log))

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._launcher.ask(pid=self.pid)
        return self._code

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.05)
        return code


# --- in the process that forks ---------------------------------------------------------------------------


def _serve_requests() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the imports print is no answer
    for module in _MODULES:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        answer = _exit_code(request["pid"]) if "pid" in request else _fork(**request)
        print(json.dumps(answer), file=answers, flush=True)


def _exit_code(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _fork(module: str, arguments: list[str], environment: dict[str, str], log: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _become(module, arguments, environment, log)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _become(module: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    """What exec would do: session, streams, environment, arguments."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, fd in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(stream, fd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    sys.argv = [module, *arguments]
    _fork_workers_too()


def _fork_workers_too() -> None:
    """vLLM for CPUs spawns its engines and workers, which would import everything again; for GPUs it forks them.

    Workers wait for each other by spinning for a second, on cores that other tests need: a millisecond is enough here.
    """
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: get_context("fork" if method == "spawn" else method)  # type: ignore[assignment,misc]
    SpinCondition.__init__.__defaults__ = (0.001,)


if __name__ == "__main__":
    _serve_requests()
