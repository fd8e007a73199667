"""A small local vLLM server as a child process, for the demo and the tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from hubsync.errors import ReplicaUnreachable
from hubsync.replicas.vllm_http import VLLMServer

# Settings with which a vLLM server of a toy model starts fast on few CPU cores. One OpenMP thread, because spinning
# threads of several processes cost a factor of 40. On a machine with accelerators vLLM ignores the CPU settings.
_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_NUM_THREADS": "1",
}
_ARGUMENTS = ("--enforce-eager", "--max-num-seqs", "64", "--dtype", "bfloat16")
EXTENSION = "vllm_plugin.DeltaWorkerExtension"


class ServerProcess:
    """A vLLM server of the checkpoint in `model`, on a free port of the loopback interface.

    Args:
        model: checkpoint directory.
        log: file for the server's output.
        bucket: address of the run to follow; without one, no worker extension is loaded.
        environment: overrides this process's environment and the defaults above; an empty value removes a variable.
        arguments: more command line arguments for the server.
        max_model_len: longest sequence, in tokens.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        bucket: str | None = None,
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        max_model_len: int = 512,
    ):
        self.log = log
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        # The module rather than the `vllm` command: not every build of vLLM installs a working command.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(max_model_len), *_ARGUMENTS]
        settings = {
            **os.environ,
            **_ENVIRONMENT,
            **({"HUBSYNC_BUCKET": bucket} if bucket else {}),
            **(environment or {}),
        }
        if bucket is not None:
            command += ["--worker-extension-cls", EXTENSION]
        environ = {key: value for key, value in settings.items() if value}
        self._process = self._launch([*command, *arguments], environ)

    def _launch(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a process group, so that `stop` ends the engine's processes too
            )

    @property
    def pid(self) -> int:
        """Process id, which is also the id of the process group."""
        return self._process.pid

    def wait_ready(self, timeout: float = 300.0) -> VLLMServer:
        """Wait until the server answers; returns a client. ReplicaUnreachable, with the log's end, if it does not."""
        server, deadline = VLLMServer(self.url), time.monotonic() + timeout
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                if server.health():
                    return server
            except ReplicaUnreachable:
                pass
            time.sleep(0.25)
        code = self._process.poll()
        outcome = f"did not start within {timeout:g} s" if code is None else f"ended with code {code}"
        raise ReplicaUnreachable(f"the vLLM server {outcome}; the end of {self.log}:\n{self.tail()}")

    def tail(self, lines: int = 100) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End the server and all of its processes. Does nothing if they have ended."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, signum)
            except ProcessLookupError:
                break
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                continue

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
