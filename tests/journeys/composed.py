"""A compose file without Docker: the command of each service, with its environment, as a process of this machine.

Read are `command`, `environment`, `healthcheck.test` and `depends_on`; paths below `/work` and the ports are
replaced by free ones. Images, networks and volumes are Docker's own: what they would do is not tested.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
_TIMEOUT_S = 600.0


class Composition:
    """The services of a compose file, as processes.

    Args:
        file: the compose file.
        directory: stands for the volume at `/work`, and has the services' logs.
        replaced: text of the file, such as ports, and what stands for it here.
    """

    def __init__(self, file: Path, directory: Path, replaced: Mapping[str, str]):
        text = file.read_text()
        for written, here in {**replaced, "/work": str(directory)}.items():
            assert written in text, written
            text = text.replace(written, here)
        self.services: dict[str, Any] = yaml.safe_load(text)["services"]
        self._directory = directory
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def up(self) -> None:
        """Start all services, each when those that it depends on are as it wants them."""
        for name in self.services:
            self._start(name)

    def wait(self, name: str) -> int:
        """The exit code of a service."""
        return self._processes[name].wait(_TIMEOUT_S)

    def execute(self, name: str, command: list[str]) -> str:
        """Run a command beside a service, with its environment. Returns its output."""
        done = subprocess.run(
            _words(command), env=self._environment(name), cwd=self._directory, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def down(self) -> None:
        for process in self._processes.values():
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, number)
                    process.wait(timeout=20)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue
        self._processes.clear()

    def log(self, name: str) -> str:
        return (self._directory / f"{name}.log").read_text(errors="replace")

    def _start(self, name: str) -> None:
        if name in self._processes:
            return
        service = self.services[name]
        for other, wanted in service.get("depends_on", {}).items():
            self._start(other)
            self._wait_until(other, wanted["condition"])
        with (self._directory / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                _words(service["command"]),
                env=self._environment(name),
                cwd=self._directory,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_until(self, name: str, condition: str) -> None:
        if condition == "service_completed_successfully":
            assert self.wait(name) == 0, self.log(name)
            return
        assert condition == "service_healthy"
        kind, *check = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        deadline = time.monotonic() + _TIMEOUT_S
        while subprocess.run(_words(check), env=self._environment(name), capture_output=True).returncode:
            assert self._processes[name].poll() is None, self.log(name)
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.5)

    def _environment(self, name: str) -> dict[str, str]:
        """Nothing of this process's but what finds programs: a container has nothing of it either."""
        here = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(self._directory)}
        return {**here, **self.services[name].get("environment", {})}


def _words(command: list[str]) -> list[str]:
    programs = {"python": [sys.executable], "hubsync": [sys.executable, "-m", "hubsync"]}
    return [*programs[command[0]], *command[1:]]
