"""A local vLLM server as a child process, for the demo and the tests: started small, and always ended."""

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

# What makes a vLLM server of a toy model start fast on few CPU cores. One OpenMP thread: with more, spinning threads
# of several processes cost a factor of 40. On a machine with accelerators vLLM ignores the CPU settings.
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
        log: file that takes the server's output.
        bucket: address of the run to follow; no worker extension is loaded without one.
        environment: added to (and overriding) this process's and the defaults above; an empty value removes a variable.
        arguments: more command line arguments for the server.
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
        # The module instead of the `vllm` command, because not every build of vLLM installs a working one.
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
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={key: value for key, value in settings.items() if value},
                start_new_session=True,  # its own process group, so that the engine's processes end with it
            )

    @property
    def pid(self) -> int:
        """Also the number of its process group."""
        return self._process.pid

    def wait_ready(self, timeout: float = 300.0) -> VLLMServer:
        """A client, once the server answers; ReplicaUnreachable, with the end of its log, if it does not."""
        server, deadline = VLLMServer(self.url), time.monotonic() + timeout
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                if server.health():
                    return server
            except ReplicaUnreachable:
                pass
            time.sleep(0.25)
        how = "did not start in time" if self._process.poll() is None else f"ended with code {self._process.poll()}"
        raise ReplicaUnreachable(f"the vLLM server {how}; the end of {self.log}:\n{self.tail()}")

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End the server and all of its processes; does nothing the second time."""
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
