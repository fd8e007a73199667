"""What a page tells a user to type, for the journeys: so the pages and the tests cannot drift apart."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```([a-z]*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def section(page: str, title: str) -> str:
    """The text under a heading, up to the next heading."""
    text = (ROOT / page).read_text()
    code = [found.span() for found in FENCE.finditer(text)]
    lines = [line for line in HEADING.finditer(text) if not any(begin <= line.start() < end for begin, end in code)]
    after = [(line.end(), line[1]) for line in lines]
    (at,) = [number for number, (_, name) in enumerate(after) if name == title]
    end = lines[at + 1].start() if at + 1 < len(lines) else len(text)
    return text[after[at][0] : end]


def blocks(page: str, language: str, title: str | None = None) -> list[str]:
    """Blocks of code of a page, or of one of its sections."""
    text = (ROOT / page).read_text() if title is None else section(page, title)
    return [code for _, kind, code in FENCE.findall(text) if kind == language]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


SERVE = "vllm serve Qwen/Qwen3-0.6B"
TRAINER_URL, RUN = "http://rollouts:8000", "hf://buckets/you/rl/run1"


def on_cpu(command: str, checkpoint: Path, *options: str) -> str:
    """A page's `vllm serve` as shell text: of a tiny model, with the settings of the quickstart, Without a GPU."""
    settings = "VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_NO_USAGE_STATS=1 OMP_NUM_THREADS=1"
    program = f"{sys.executable} -m vllm.entrypoints.openai.api_server --model {checkpoint} --enforce-eager"
    assert command.count(SERVE) == 1, command
    served = command.replace(SERVE, " ".join([program, "--max-model-len 512 --max-num-seqs 64", *options]))
    return f"export {settings}\nexec env {served.strip()}\n"


def here(line: str) -> str:
    """A page's `hubsync ...` or `python ...` with this interpreter."""
    for program, words in (("hubsync", "-m hubsync"), ("python", "")):
        line = re.sub(rf"(^|\n){program} ", rf"\1{sys.executable} {words} ", line)
    return line


class Shell:
    """A user's shell: commands with one environment, in one directory."""

    def __init__(self, directory: Path, **environment: str):
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HUBSYNC_CACHE": str(directory / "cache"),
            **environment,
        }

    def run(self, command: str, *, fails: bool = False) -> str:
        """Output of a command, stderr included. AssertionError if it does not succeed, or fail, as expected."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.directory,
            env=self.environment,
            stdout=-1,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert (done.returncode != 0) == fails, done.stdout
        return done.stdout

    @contextmanager
    def background(self, *command: str) -> Iterator[Path]:
        """A program that is ended with the context. Yields the file of its output."""
        log = self.directory / "background.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=self.directory, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )
        try:
            yield log
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(condition: Callable[[], object], log: Path, seconds: float = 300.0) -> None:
    """Until the condition holds; an AssertionError with the end of the log if it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-5000:]
        time.sleep(0.5)


def answers(url: str) -> bool:
    """Whether a vLLM server is up."""
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.HTTPError:
        return False
