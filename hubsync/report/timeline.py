"""Figures of time: phases of each version, and what replicas served when."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .gather import PUBLISHER, PUSHED, Gathered, PhaseSpan
from .style import GREY, PHASE_COLOURS, RED, SERIES, Drawing, duration, figure, version_axis

MOST_VERSIONS = 300  # that are drawn with their phases, the newest
_SHOWN = 24  # of these, that are seen before the reader moves

_FOLLOW = (
    "Replicas are not drawn: write their events down with `hubsync follow ADDRESS --server URL --json > follow.jsonl` "
    "and give --events follow.jsonl, or give the trainer's log with --log (logging_steps=1)."
)
_NO_TIMES = "Manifests of this run do not state when versions were detected, encoded and uploaded."


def phases(run: Gathered) -> list[Drawing]:
    """Phases of each version: of the trainer, of replicas, and all of them by time."""
    if not run.spans:
        said = _NO_TIMES if run.deltas else "The run has no version yet: nothing was published."
        return [Drawing("phases", "Phases of each version", said)]
    newest = set(sorted({span.version for span in run.spans})[-MOST_VERSIONS:])
    spans = [span for span in run.spans if span.version in newest]
    drag = " Drag to see older versions."
    if len(newest) == MOST_VERSIONS:
        drag += f" Only the newest {MOST_VERSIONS} are drawn."
    ours = [span for span in spans if span.lane == PUBLISHER]
    theirs = [span for span in spans if span.lane != PUBLISHER]
    trainer, servers = "Publishing each version", "Committing each version on replicas"
    lanes = ", ".join(run.labels[lane] for lane in run.lanes[1:])
    begin = "Zero is the begin of detection."
    drawings = [
        Drawing("publishing", trainer, begin + drag, _by_version(ours, [PUBLISHER], "seconds since detection began"))
        if ours
        else Drawing("publishing", trainer, _NO_TIMES),
        Drawing(
            "committing",
            servers,
            f"Zero is the begin of staging. In each row from top to bottom: {lanes}.{drag}{_missing(run)}",
            _by_version(theirs, run.lanes[1:], "seconds since staging began"),
        )
        if theirs
        else Drawing("committing", servers, _FOLLOW),
    ]
    caption = "Bars are drawn at least one pixel wide. Drag over a part to see it larger; a double click shows all."
    return [*drawings, Drawing("time", "All phases by time", caption, _by_time(run, spans))]


def _missing(run: Gathered) -> str:
    said = "" if any(delta.times for delta in run.deltas) else f" {_NO_TIMES}"
    if len(run.lanes) == 1:
        return f"{said} {_FOLLOW}"
    if PUSHED in run.lanes:
        said += (
            f" Of {PUSHED} the log states durations, and no times: its commits are placed behind the upload, "
            "and verification is not in it."
        )
    undated = sum(event.time is None and event.kind == "commit" for event in run.events)
    if undated:
        said += f" {undated} commits of an older follower have no time and are not drawn."
    return said


def _by_version(spans: Sequence[PhaseSpan], lanes: Sequence[str], title: str) -> go.Figure:
    """A row for each version, in it a bar of phases for each lane, which begins at zero."""
    begins: dict[tuple[str, int], float] = {}
    groups: dict[tuple[str, int], list[PhaseSpan]] = defaultdict(list)
    for span in spans:
        own = span.lane, span.version
        begins[own] = min(begins.get(own, span.begin), span.begin)
        groups[span.phase, lanes.index(span.lane)].append(span)
    versions = sorted({span.version for span in spans})
    shown = set(versions[-_SHOWN:])
    ends = sorted(span.end - begins[span.lane, span.version] for span in spans if span.version in shown)
    end = 1.1 * ends[int(0.95 * (len(ends) - 1))]  # one that took very long must not hide the others
    drawn = figure(
        480,
        barmode="overlay",
        showlegend=True,
        xaxis={"title": {"text": title}, "range": [-0.01 * end, end]},
        yaxis={**version_axis(sorted(shown)), "range": [min(shown) - 0.6, versions[-1] + 0.6]},
        dragmode="pan",
    )
    width, seen = 0.84 / len(lanes), set()
    for phase, lane in sorted(groups, key=lambda key: (list(PHASE_COLOURS).index(key[0]), key[1])):
        group = groups[phase, lane]
        base = [span.begin - begins[span.lane, span.version] for span in group]
        bars = _bars(phase, group, base, phase not in seen)
        seen.add(phase)
        bars.update(
            y=[span.version for span in group],
            x=[span.end - span.begin for span in group],
            offset=0.42 - (lane + 1) * width,
            width=width * 0.92,
        )
        drawn.add_trace(bars)
    return drawn


def _by_time(run: Gathered, spans: Sequence[PhaseSpan]) -> go.Figure:
    rows: dict[str, dict[str, None]] = defaultdict(dict)
    groups: dict[str, list[PhaseSpan]] = defaultdict(list)
    for span in spans:
        groups[span.phase].append(span)
        rows[span.lane][span.phase] = None
    names = [_row(run, lane, phase) for lane in run.lanes for phase in PHASE_COLOURS if phase in rows[lane]]
    drawn = figure(
        110 + 26 * len(names),
        barmode="overlay",
        xaxis={"type": "date", "title": {"text": "time (UTC)"}},
        yaxis={"type": "category", "categoryorder": "array", "categoryarray": names[::-1], "showgrid": False},
    )
    for phase in PHASE_COLOURS:
        if group := groups[phase]:
            bars = _bars(phase, group, [_date(span.begin) for span in group], False)
            bars.update(y=[_row(run, span.lane, phase) for span in group], width=0.7)
            bars.update(x=[1000 * (span.end - span.begin) for span in group])
            drawn.add_trace(bars)
    return drawn


def _row(run: Gathered, lane: str, phase: str) -> str:
    return f"{_plain(run.labels[lane])} {phase}"


def _plain(text: str) -> str:
    """Text from elsewhere without what plotly takes for markup."""
    return escape(text, quote=False)


def _bars(phase: str, spans: Sequence[PhaseSpan], base: Sequence[Any], in_legend: bool) -> go.Bar:
    colour = PHASE_COLOURS[phase]
    return go.Bar(
        orientation="h",
        base=list(base),
        name=phase,
        legendgroup=phase,
        showlegend=in_legend,
        marker={"color": colour, "line": {"color": colour, "width": 1}},
        text=[
            f"version {span.version}, {_plain(span.lane)}: {phase} {duration(span.end - span.begin)}" for span in spans
        ],
        textposition="none",
        hovertemplate="%{text}<extra></extra>",
    )


def _date(seconds: float) -> float:
    """As plotly reads it: milliseconds since 1970."""
    return round(1000 * seconds, 3)


# --- replicas ---------------------------------------------------------------------------------------------


def replicas(run: Gathered) -> Drawing:
    """Versions by time, lag and delay of every replica."""
    title = "Versions and lag of replicas"
    if not run.durable:
        return Drawing("replicas", title, "The run has no version yet: nothing was published.")
    dated = [lane for lane in run.lanes if lane not in (PUBLISHER, PUSHED)]  # when the others committed is assumed
    rows = ("version", "lag (versions)", "delay (s)")[: 3 if dated else 1]
    heights = [0.5, 0.25, 0.25][: len(rows)]
    drawn = make_subplots(rows=len(rows), cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=heights)
    times = sorted((at, version) for version, at in run.durable.items())
    _step(drawn, 1, times, "published", GREY, "published version %{y}, durable %{x|%H:%M:%S.%L}", width=5)
    commits = [event for event in run.commits if event.kind == "commit"]
    for number, server in enumerate(run.lanes[1:]):
        colour, name = SERIES[number % (len(SERIES) - 1)], _plain(run.labels[server])
        own = [(event.time or 0.0, event.version or 0) for event in commits if event.server == server]
        _step(drawn, 1, own, name, colour, f"{name} served version %{{y}} from %{{x|%H:%M:%S.%L}}")
        if server in dated:
            _step(drawn, 2, lags(run, own), name, colour, f"{name}: %{{y}} versions behind", legend=False)
            late = [(at, at - run.durable[version]) for at, version in own if run.durable.get(version, at) <= at]
            hover = f"{name}: %{{y:.3f}} s after it was durable"
            _step(drawn, 3, late, name, colour, hover, legend=False, shape="linear")
    _errors(drawn, run)
    height = 560 if dated else 320
    drawn.update_layout(height=height, template=None, margin={"l": 56, "r": 16, "t": 28, "b": 44}, showlegend=True)
    for row, text in enumerate(rows, 1):
        drawn.update_yaxes(title={"text": text}, rangemode="tozero", row=row, col=1)
    drawn.update_xaxes(type="date")
    drawn.update_xaxes(title={"text": "time (UTC)"}, row=len(rows), col=1)
    caption = (
        "Lag: versions that were to be served and were not yet. Delay: from a durable version to its commit. Versions "
        "that a replica skipped have none."
    )
    if PUSHED in run.lanes:
        caption += f" Lag and delay of {PUSHED} are not known."
    return Drawing("replicas", title, caption + _missing(run), drawn)


def _step(
    drawn: go.Figure,
    row: int,
    points: Sequence[tuple[float, float]],
    name: str,
    colour: str,
    hover: str,
    **how: Any,
) -> None:
    line = {"shape": how.get("shape", "hv"), "width": how.get("width", 1.5), "color": colour}
    trace = go.Scatter(
        x=[_date(at) for at, _ in points],
        y=[value for _, value in points],
        name=name,
        legendgroup=name,
        showlegend=how.get("legend", True),
        mode="lines+markers" if len(points) < 400 else "lines",
        marker={"size": 4},
        opacity=0.5 if "width" in how else 1.0,
        line=line,
        hovertemplate=hover + "<extra></extra>",
    )
    drawn.add_trace(trace, row=row, col=1)


def lags(run: Gathered, commits: Iterable[tuple[float, int]]) -> list[tuple[float, int]]:
    """(time, versions behind) of a replica, at each of its commits and of the run's versions after the first commit."""
    own = sorted(commits)
    if not own:
        return []
    target = sorted((run.durable[delta.version], delta.served) for delta in run.deltas)
    at, since, found = [time for time, _ in target], [time for time, _ in own], []
    for moment in sorted({*since, *(time for time in at if time >= since[0])}):
        due = bisect_right(at, moment)
        has = own[bisect_right(since, moment) - 1][1]
        found.append((moment, (target[due - 1][1] if due else 0) - has))
    return found


def _errors(drawn: go.Figure, run: Gathered) -> None:
    errors = [event for event in run.events if event.kind == "error" and event.time is not None]
    if errors:
        trace = go.Scatter(
            x=[_date(event.time or 0.0) for event in errors],
            y=[0] * len(errors),
            mode="markers",
            name="errors",
            marker={"symbol": "x", "color": RED, "size": 8},
            text=[_plain(event.message[:120]) for event in errors],
            hovertemplate="%{text}<extra></extra>",
        )
        drawn.add_trace(trace, row=1, col=1)
