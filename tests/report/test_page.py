"""The page of `hubsync report`, opened in a real browser: every figure is drawn, and nothing is asked for."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hubsync.bucket import LocalBucket
from hubsync.cli.main import main
from hubsync.report.page import page
from hubsync.report.records import read_log
from hubsync.report.style import PHASE_COLOURS
from tests.report.runs import SERVER, events_of, everything, gathered, history, log_of, timed
from tests.support.browser import Browser, find_browser
from tests.support.history import History
from tests.support.standin import StandIn

SECTIONS = ("run", "sizes", "where", "timeline", "lag", "stored", "samples", "training")
FIGURES = {"share", "payload", "bits", "layers", "kinds", "publishing", "committing", "time", "replicas", "storage"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(find_browser(), tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def opened(browser: Browser, file: Path, theme: str = "light", width: int = 1400) -> None:
    browser.errors.clear()
    browser.requests.clear()
    browser.look(theme, width)
    browser.open(file)
    drawn(browser, theme)


def drawn(browser: Browser, theme: str) -> None:
    browser.until(f"document.documentElement.dataset.drawn === '{theme}'")


def keys(browser: Browser, selector: str, attribute: str) -> set[str]:
    found = f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.getAttribute('{attribute}'))"
    return set(json.loads(browser.value(f"JSON.stringify({found})")))


def test_an_error_and_a_request_would_be_seen(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text(
        "<script>console.error('one'); fetch('http://127.0.0.1:9/').catch(() => {}); undefined.two</script>"
    )
    browser.open(file)
    browser.until("true")
    assert "one" in browser.errors
    assert any("undefined" in error for error in browser.errors)
    assert browser.requests == ["http://127.0.0.1:9/"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_section_is_drawn_without_an_error_or_a_request(browser: Browser, tmp_path: Path, theme: str) -> None:
    file = tmp_path / "run.html"
    file.write_text(page(everything(tmp_path)))
    opened(browser, file, theme)
    assert keys(browser, "section", "id") == set(SECTIONS)
    check_figures(browser, 1400)
    browser.value("document.documentElement.dataset.drawn = ''")
    browser.look(theme, 400)
    drawn(browser, theme)
    check_figures(browser, 400)
    phases = browser.value("JSON.stringify([...document.querySelectorAll('.legendtext')].map(e => e.textContent))")
    assert set(PHASE_COLOURS) <= set(json.loads(phases))
    assert browser.value("getComputedStyle(document.body).backgroundColor") == (
        "rgb(15, 19, 24)" if theme == "dark" else "rgb(245, 247, 250)"
    )
    assert (browser.errors, browser.requests) == ([], [])


def check_figures(browser: Browser, width: int) -> None:
    """Each figure has marks in its plot, and nothing is wider than the page."""
    figures = keys(browser, ".figure", "id")
    assert figures >= FIGURES | {"staleness", "scalar-0"}
    assert keys(browser, "[data-missing]", "data-missing") == set()
    marks = ".points path, .scatterlayer path, .heatmaplayer image"
    for key in figures:
        assert browser.value(f"document.getElementById('{key}').querySelector('{marks}') !== null"), key
    assert browser.value("document.documentElement.scrollWidth") <= width


def test_the_theme_can_be_changed(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "run.html"
    file.write_text(page(gathered(tmp_path, history(tmp_path, 2))))
    opened(browser, file, "light")
    colour = "getComputedStyle(document.querySelector('#share .xtick text')).fill"
    light = browser.value(colour)
    browser.value("document.getElementById('theme').click()")
    drawn(browser, "dark")
    assert browser.value(colour) != light
    browser.value("document.getElementById('theme').click()")
    drawn(browser, "light")
    browser.look("dark", 1400)  # the reader has chosen: the system's theme does not matter
    assert browser.value("document.documentElement.dataset.theme") == "light"
    assert (browser.errors, browser.requests) == ([], [])


def test_what_is_not_recorded_is_said(browser: Browser, tmp_path: Path) -> None:
    """A run without times, followers or a log, and a run without versions."""
    file = tmp_path / "run.html"
    file.write_text(page(gathered(tmp_path, history(tmp_path, 2))))
    opened(browser, file)
    missing = keys(browser, "[data-missing]", "data-missing")
    assert missing == {"phases", "staleness", "scalars"}
    text = browser.value("document.querySelector('main').innerText")
    for said in (
        "--log trainer_state.json",
        "--events follow.jsonl",
        "Manifests of this run do not state",
        "--server URL",
    ):
        assert said in text
    assert (browser.errors, browser.requests) == ([], [])

    # A log alone has no times: there is no lag and no delay.
    file.write_text(page(timed(gathered(tmp_path, history(tmp_path / "pushed", 2), log=read_log(log_of(tmp_path, 2))))))
    opened(browser, file)
    assert "Lag and delay of the trainer's server are not known" in browser.value("document.body.innerText")
    assert "from durable to served" not in browser.value("document.querySelector('.tiles').innerText")
    assert browser.value("document.querySelectorAll('#replicas .cartesianlayer > g').length") == 1

    empty = History(LocalBucket(tmp_path / "empty", create=True))
    file.write_text(page(gathered(tmp_path, empty)))
    opened(browser, file)
    assert "nothing was published" in browser.value("document.querySelector('main').innerText")
    assert keys(browser, ".figure", "id") == set()
    assert (browser.errors, browser.requests) == ([], [])


def test_text_from_elsewhere_is_no_markup(browser: Browser, tmp_path: Path) -> None:
    """Names of servers and metrics, and messages, come from files and from whoever may write to the bucket."""
    hostile = "</script><img src=x onerror=console.error('run')><b id=found>"
    made = history(tmp_path, 2)
    log, events = tmp_path / "log.jsonl", tmp_path / "events.jsonl"
    log.write_text("\n".join(json.dumps({"step": step, hostile: step, "reward": step}) for step in range(3)))
    commit = {
        "event": "commit",
        "time": 2e9,
        "server": hostile,
        "version": 2,
        "stage_s": 1,
    }
    error = {"event": "error", "time": 2e9, "error": hostile, "message": hostile}
    events.write_text("\n".join(map(json.dumps, (commit, error))))
    file = tmp_path / "run.html"
    assert main(["report", made.bucket.address, "-o", str(file), "--log", str(log), "--events", str(events)]) == 0
    opened(browser, file)
    assert browser.value("document.getElementById('found')") is None
    assert hostile in browser.value("document.querySelector('main').innerText")
    assert (browser.errors, browser.requests) == ([], [])


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, file = history(tmp_path), tmp_path / "run.html"
    with StandIn(list(made.views)[1]) as server:
        options = ["--log", str(log_of(tmp_path)), "--events", str(events_of(tmp_path)), "--server", server.url]
        assert main(["report", made.bucket.address, "-o", str(file), *options, "--server", "http://127.0.0.1:9"]) == 0
        text = file.read_text()
        assert server.url in text
    assert "is the vLLM server up" in text
    assert SERVER.removeprefix("http://") in text
    assert "newest version 6" in capsys.readouterr().out


def test_without_plotly_the_command_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "plotly" else find_spec(name, *rest)
    )
    made = history(tmp_path, 1)
    assert main(["report", made.bucket.address, "-o", str(tmp_path / "run.html")]) == 1
    assert "pip install 'hubsync-rl[report]'" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = history(tmp_path, 1)
    assert main(["report", made.bucket.address, "-o", str(tmp_path / "no" / "run.html")]) == 1
    assert "cannot write" in capsys.readouterr().err
