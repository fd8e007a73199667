"""A real headless Chromium, driven by its DevTools protocol over a pipe: no driver, no library.

Debian and Ubuntu: `apt-get install chromium`. `HUBSYNC_TEST_BROWSER` names another program. `make test-all` sets
HUBSYNC_NEED_BROWSER, so that a browser that is missing fails the tests; otherwise they are skipped, and say so.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE_S = 120.0


def find_browser() -> str:
    """Its program. Skips the test where there is none, unless one is required."""
    named = os.environ.get("HUBSYNC_TEST_BROWSER")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        reason = "no headless browser: the page is not opened. apt-get install chromium, or set HUBSYNC_TEST_BROWSER"
        if os.environ.get("HUBSYNC_NEED_BROWSER"):
            pytest.fail(reason)
        warnings.warn(reason, stacklevel=2)  # a skip alone is a letter
        pytest.skip(reason)
    return found


def _pipe() -> tuple[int, int]:
    """A pipe with descriptors of two digits: those of one digit are the browser's."""
    ends = os.pipe()
    high = fcntl.fcntl(ends[0], fcntl.F_DUPFD_CLOEXEC, 10), fcntl.fcntl(ends[1], fcntl.F_DUPFD_CLOEXEC, 10)
    for end in ends:
        os.close(end)
    return high


class Browser:
    """One page of a headless browser.

    Attributes:
        errors: what its console, its log and uncaught exceptions said.
        requests: URLs that the page asked for, but for its own.
    """

    def __init__(self, program: str, profile: Path):
        to_browser, ours_out = _pipe()
        ours_in, from_browser = _pipe()
        # The browser reads descriptor 3 and writes descriptor 4; a shell moves the pipes there.
        flags = (
            f"--headless --no-sandbox --disable-gpu --hide-scrollbars --disable-dev-shm-usage --no-first-run "
            f"--disable-background-networking --remote-debugging-pipe --user-data-dir={profile} about:blank"
        )
        script = f'exec "$0" {flags} 3<&{to_browser} 4>&{from_browser} {to_browser}<&- {from_browser}>&-'
        self._process = subprocess.Popen(
            ["bash", "-c", script, program],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._in, self._out, self._buffer, self._number = ours_in, ours_out, b"", 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        targets = self._call("Target.getTargets")["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def look(self, theme: str, width: int, height: int = 900) -> None:
        """The size of the page, and the system's theme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def open(self, page: Path) -> None:
        self.value("window.isLeft = true")
        self.call("Page.navigate", url=page.as_uri())
        self.until("!window.isLeft && document.readyState === 'complete'")

    def until(self, condition: str) -> None:
        """Wait until an expression of JavaScript is true."""
        end = time.monotonic() + PATIENCE_S
        while not self.value(condition):
            assert time.monotonic() < end, f"never true: {condition}; {self.errors}"
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """Value of an expression of JavaScript."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """Of the whole page, however long."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")["data"]
        file.write_bytes(base64.b64decode(data))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A method of the page's session."""
        return self._call(method, self._session, **parameters)

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {
            "id": self._number,
            "method": method,
            "params": parameters,
            **({"sessionId": session} if session else {}),
        }
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], PATIENCE_S)
            piece = os.read(self._in, 1 << 20) if ready else b""
            assert piece, "the browser ended, or says nothing"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, said = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = said["exceptionDetails"]
            self.errors.append(str(details.get("exception", {}).get("description") or details["text"]))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(argument.get("value")) for argument in said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.errors.append(str(said["entry"]["text"]))
        elif method == "Network.requestWillBeSent":
            url = said["request"]["url"]
            if not url.startswith(("data:", "blob:")) and said.get("type") != "Document":
                self.requests.append(url)
