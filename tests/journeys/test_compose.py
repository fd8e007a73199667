"""The compose file, by the commands of deploy/README.md: with Docker where there is one, else services as processes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from .composed import ROOT, Composition
from .pages import blocks, free_port

pytestmark = [pytest.mark.server, pytest.mark.long]

FILE = ROOT / "deploy/compose.yaml"
PREFIX = "docker compose -f deploy/compose.yaml "
STEPS = 10


def has_docker() -> bool:
    if shutil.which("docker") is None:
        return False
    answers = [subprocess.run(["docker", *words], capture_output=True) for words in (["info"], ["compose", "version"])]
    return all(answer.returncode == 0 for answer in answers)


def test_the_compose_file_trains_and_both_servers_follow(tmp_path: Path) -> None:
    (block,) = [text for text in blocks("deploy/README.md", "bash") if text.startswith(PREFIX)]
    commands = [line.removeprefix(PREFIX) for line in block.splitlines()]
    said = by_docker(commands) if has_docker() else by_processes(commands, tmp_path)
    status, verified, listed = said
    assert re.search(rf"^version +{STEPS}$", status, re.MULTILINE), status
    assert re.search(rf"serves version {STEPS} .* bit for bit", verified), verified
    assert re.search(rf"^ +{STEPS} +delta .* served$", listed, re.MULTILINE), listed


def by_docker(commands: list[str]) -> list[str]:
    """Each line as it is written."""
    said = []
    try:
        for line in commands:
            done = subprocess.run(shlex.split(PREFIX + line), cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            said += [done.stdout] if line.startswith("exec") else []
    finally:
        subprocess.run(shlex.split(PREFIX + "down --volumes"), cwd=ROOT, capture_output=True)
    return said


def by_processes(commands: list[str], directory: Path) -> list[str]:
    ports = {port: str(free_port()) for port in ("8418", "8000", "8001")}
    composition = Composition(FILE, directory, ports)
    said = []
    try:
        for verb, *words in map(shlex.split, commands):
            if verb == "up":
                composition.up()
            elif verb == "wait":
                assert composition.wait(words[0]) == 0, composition.log(words[0])
            elif verb == "exec":
                service, *command = words
                said.append(composition.execute(service, [_moved(word, ports) for word in command]))
            else:
                assert verb == "down"
                composition.down()
    finally:
        composition.down()
    return said


def _moved(word: str, ports: dict[str, str]) -> str:
    return re.sub(r"\b(8418|8000|8001)\b", lambda port: ports[port[0]], word)
