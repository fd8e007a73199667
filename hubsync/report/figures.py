"""Figures of versions: their size, where weights change, what is stored, and what the trainer logged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from hubsync.chain.layout import Layout
from hubsync.format.manifest import Manifest

from .density import Density, kind_of, layer_of
from .gather import Gathered
from .records import SYNC, TrainerLog
from .style import BLUE, GREEN, GREY, ORANGE, RED, Drawing, figure, nbytes, version_axis

_MOST_ROWS = 400  # of a heat map
_MOST_SCALARS = 12
_FIRST_SCALARS = ("reward", "reward_std", "loss", "kl", "entropy", "grad_norm", "completions/mean_length", "step_time")


def sizes(run: Gathered) -> list[Drawing]:
    """Changed share, payload, and bits per change against the floor."""
    if not run.deltas:
        return [Drawing("share", "Changed weights", "The run has no version yet: nothing was published.")]
    versions = [delta.version for delta in run.deltas]
    share = [100 * delta.changed / max(1, run.run.table.numel) for delta in run.deltas]
    share_figure = figure(
        260,
        _points(versions, share, "changed", BLUE, "version %{x}: %{y:.4g} %<extra></extra>"),
        xaxis=version_axis(versions),
        yaxis={"title": {"text": "changed (%)"}, "rangemode": "tozero"},
    )
    payload = [delta.nbytes for delta in run.deltas]
    payload_figure = figure(
        260,
        _points(
            versions, payload, "payload", GREEN, "version %{x}: %{customdata}<extra></extra>", map(nbytes, payload)
        ),
        xaxis=version_axis(versions),
        yaxis={"title": {"text": "payload (bytes)"}, "rangemode": "tozero", "tickformat": "~s"},
    )
    dense = nbytes(run.run.table.nbytes)
    return [
        Drawing(
            "share", "Changed weights", "Share of all elements whose bits differ from the version before.", share_figure
        ),
        Drawing(
            "payload", "Payload", f"Bytes of all parts of a version. All weights would be {dense}.", payload_figure
        ),
        _bits(run),
    ]


def _points(
    x: Iterable[float], y: Iterable[float], name: str, colour: str, hover: str, custom: Iterable[str] = ()
) -> go.Scatter:
    x = list(x)
    return go.Scatter(
        x=x,
        y=list(y),
        name=name,
        hovertemplate=hover,
        customdata=list(custom) or None,
        mode="lines" if len(x) > 300 else "lines+markers",
        line={"width": 1.5, "color": colour},
        marker={"size": 4, "color": colour},
    )


def _bits(run: Gathered) -> Drawing:
    density, title = run.density, "Bits per changed weight, and the floor"
    deltas = [delta for delta in run.deltas if delta.changed]
    bits = [8 * delta.nbytes / delta.changed for delta in deltas]
    versions = [delta.version for delta in deltas]
    hover = "version %{x}: %{y:.2f} bits<extra></extra>"
    drawn = figure(
        300,
        _points(versions, bits, "uploaded", BLUE, hover),
        xaxis=version_axis(versions),
        yaxis={"title": {"text": "bits per changed weight"}},
        showlegend=True,
    )
    floor = density.position_floor
    if len(floor):
        drawn.add_trace(_points(density.versions, floor + 1, "floor: positions and signs", GREY, hover))
    known = [at for at, version in enumerate(density.versions) if version in density.differences]
    if known:
        whole = [floor[at] + density.differences[density.versions[at]] / density.totals[at] for at in known]
        marks = {
            "mode": "markers",
            "marker": {"size": 9, "symbol": "diamond-open", "color": ORANGE, "line": {"width": 2}},
        }
        x = [density.versions[at] for at in known]
        drawn.add_trace(go.Scatter(x=x, y=whole, name="floor: positions and steps", hovertemplate=hover, **marks))
    caption = (
        "Floor: the ideal length of the positions, tensor by tensor, and one bit for each sign. Diamonds have the "
        f"entropy of the steps instead of the signs, of {len(known)} versions that were decoded whole. Compact parts "
        "may lie below: they also use the old exponents."
    )
    return Drawing("bits", title, caption + _left_out(density), drawn)


def _left_out(density: Density) -> str:
    said = f" Every {density.step}th version was read." if density.step > 1 else ""
    for reason, count in list(density.failed.items())[:3]:
        said += f" {count} versions were not read: {reason}."
    return said


def heat_maps(run: Gathered) -> list[Drawing]:
    """Changed share by layer and by kind of tensor, each by version."""
    density = run.density
    if not density.versions:
        said = "Where weights change is not known: no version could be read." + _left_out(density)
        return [Drawing("layers", "Density by layer", said)]
    names = [spec.name for spec in density.table]
    drawings = []
    for key, title, group in (
        ("layers", "Density by layer", layer_of),
        ("kinds", "Density by kind of weight", kind_of),
    ):
        rows, share = density.by([group(name) for name in names])
        caption = "Changed share of each row's elements, in one version. Grey cells did not change."
        drawn = _heat_map(rows[:_MOST_ROWS], 100 * share[:_MOST_ROWS], density.versions)
        more = f" {len(rows) - _MOST_ROWS} more rows are not drawn." if len(rows) > _MOST_ROWS else ""
        drawings.append(Drawing(key, title, caption + more + _left_out(density), drawn))
    return drawings


def _heat_map(rows: Sequence[str], percent: np.ndarray, versions: Sequence[int]) -> go.Figure:
    known = np.where(percent > 0, percent, np.nan)
    low, high = (
        (np.floor(np.nanmin(np.log10(known))), np.ceil(np.nanmax(np.log10(known)))) if (percent > 0).any() else (-1, 0)
    )
    z = [[None if np.isnan(v) else round(float(v), 3) for v in row] for row in np.log10(known)]
    ticks = _ticks(float(low), float(high))
    heat = go.Heatmap(
        z=z,
        x=list(versions),
        y=[_short(name) for name in rows],
        text=[[f"{v:.3g}" for v in row] for row in percent],
        hovertemplate="%{y}<br>version %{x}: %{text} %<extra></extra>",
        hoverongaps=False,
        zmin=np.nanmin(np.log10(known)) if (percent > 0).any() else -1,
        zmax=np.nanmax(np.log10(known)) if (percent > 0).any() else 0,
        colorbar={
            "tickvals": [np.log10(tick) for tick in ticks],
            "ticktext": [f"{tick:g} %" for tick in ticks],
        },
    )
    height = int(min(900, max(220, 90 + 18 * len(rows))))
    return figure(
        height,
        heat,
        xaxis={**version_axis(versions), "showgrid": False},
        yaxis={"autorange": "reversed", "showgrid": False, "type": "category"},
    )


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade."""
    return [round(m * 10.0**e, 12) for e in range(int(low) - 1, int(high) + 1) for m in (1, 2, 5)]


def _short(name: str) -> str:
    """A row's name without the `model.` that all have."""
    return name.removeprefix("model.")


# --- storage ----------------------------------------------------------------------------------------------


def storage(run: Gathered) -> Drawing:
    """Which versions, anchors and merged deltas there are."""
    title = "Deltas, merged deltas and anchors"
    if not run.deltas and not run.anchors:
        return Drawing("storage", title, "The run has no version yet: nothing was published.")
    rows = {"deltas": _deltas(run)}
    for bar in _merged(run):
        rows.setdefault(f"merged {_power(bar.last - bar.first)}", []).append(bar)
    bars, ticks = _stacked(rows)
    top = bars[-1][0] + 2.5 if bars else 1.0
    drawn = figure(int(130 + 9 * top), barmode="overlay", showlegend=True, xaxis=version_axis([0, run.newest.version]))
    for unneeded, colour, name in ((False, BLUE, "needed"), (True, RED, "unneeded, recorded by hubsync gc")):
        if own := [(y, bar) for y, bar in bars if bar.unneeded == unneeded]:
            drawn.add_trace(_bars(own, colour, name))
    if run.anchors:
        ticks["anchors"] = top
        drawn.add_trace(_anchors(run, top))
    drawn.add_vline(x=run.served.version, line={"color": GREEN, "width": 1.5, "dash": "dot"})
    labels = {"tickvals": list(ticks.values()), "ticktext": list(ticks), "range": [-1.2, top + 1.2]}
    drawn.update_layout(yaxis={**labels, "showgrid": False, "zeroline": False})
    return Drawing("storage", title, _storage_caption(run), drawn)


class _Stored(NamedTuple):
    """Deltas from version `first` to version `last`."""

    first: int
    last: int
    nbytes: int
    unneeded: bool


def _deltas(run: Gathered) -> list[_Stored]:
    """Deltas that follow each other as one bar."""
    found: list[_Stored] = []
    for delta in run.deltas:
        assert delta.parent is not None  # the parser guarantees it
        unneeded, last = _is_unneeded(run, delta), found[-1] if found else None
        if last is not None and (last.last, last.unneeded) == (delta.parent.version, unneeded):
            found[-1] = last._replace(last=delta.version, nbytes=last.nbytes + delta.nbytes)
        else:
            found.append(_Stored(delta.parent.version, delta.version, delta.nbytes, unneeded))
    return found


def _merged(run: Gathered) -> list[_Stored]:
    """Merged deltas, the shortest first."""
    bars = [
        _Stored(delta.parent.version, delta.version, delta.nbytes, _is_unneeded(run, delta))
        for delta in run.merged
        if delta.parent is not None
    ]
    return sorted(bars, key=lambda bar: (_power(bar.last - bar.first), bar.first))


def _power(versions: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << max(0, versions - 1).bit_length()


def _stacked(rows: Mapping[str, Sequence[_Stored]]) -> tuple[list[tuple[float, _Stored]], dict[str, float]]:
    """Bars with their heights, upwards, so that none covers another; and the middle of each row."""
    placed, ticks, base = [], {}, 0.0
    for label, bars in rows.items():
        ends: list[int] = []  # of the lanes of this row
        for bar in bars:
            lane = next((n for n, end in enumerate(ends) if end <= bar.first), len(ends))
            ends[lane : lane + 1] = [bar.last]
            placed.append((base + lane, bar))
        ticks[label] = base + (max(1, len(ends)) - 1) / 2
        base += len(ends) + 0.8
    return placed, ticks


def _anchors(run: Gathered, y: float) -> go.Scatter:
    return go.Scatter(
        x=[anchor.version for anchor in run.anchors],
        y=[y] * len(run.anchors),
        mode="markers",
        name="anchor",
        cliponaxis=False,
        marker={
            "symbol": "diamond",
            "size": 11,
            "color": [RED if _is_unneeded(run, anchor) else ORANGE for anchor in run.anchors],
        },
        text=[nbytes(anchor.nbytes) for anchor in run.anchors],
        hovertemplate="anchor of version %{x}: %{text}<extra></extra>",
    )


def _storage_caption(run: Gathered) -> str:
    count = {"Deltas": run.deltas, "merged deltas": run.merged, "anchors": run.anchors}
    said = ", ".join(f"{kind}: {len(found)} ({nbytes(sum(m.nbytes for m in found))})" for kind, found in count.items())
    said += (
        ". `merged 8` are those of up to 8 versions. A bar reaches from the version that a delta applies to, to the "
    )
    said += "one that it makes; gaps are deleted "
    said += f"versions or skipped numbers. Dotted line: the served version, {run.served.version}."
    if not run.merged:
        said += " No deltas are merged: `hubsync compact` does that."
    if not run.unneeded:
        said += " Nothing is recorded as unneeded: `hubsync gc` does that."
    return said


def _is_unneeded(run: Gathered, manifest: Manifest) -> bool:
    return Layout.manifest(manifest) in run.unneeded


def _bars(bars: Sequence[tuple[float, _Stored]], colour: str, name: str) -> go.Bar:
    gap = 0.0015 * max(bar.last for _, bar in bars)  # so that bars are told apart
    return go.Bar(
        orientation="h",
        y=[y for y, _ in bars],
        base=[bar.first + gap for _, bar in bars],
        x=[max(gap, bar.last - bar.first - 2 * gap) for _, bar in bars],
        text=[f"versions {bar.first} to {bar.last}: {nbytes(bar.nbytes)}" for _, bar in bars],
        textposition="none",
        hovertemplate="%{text}<extra></extra>",
        name=name,
        width=0.7,
        marker={"color": colour},
    )


# --- the trainer's log ------------------------------------------------------------------------------------

_GIVE_A_LOG = "Give the trainer's log: `--log trainer_state.json` (of a checkpoint), or JSON lines of log_history."


def staleness(log: TrainerLog | None) -> Drawing:
    """Age of samples, in versions."""
    title = "Staleness of samples"
    if log is None:
        return Drawing("staleness", title, f"Not known. {_GIVE_A_LOG}")
    now, oldest, newest = f"{SYNC}version", f"{SYNC}version_min", f"{SYNC}version_max"
    rows = [row for row in log.rows if now in row and oldest in row]
    if not rows:
        return Drawing(
            "staleness",
            title,
            f"The log has no {oldest}: only TRL's asynchronous trainers with HubWeightTransfer record which versions "
            "made a sample. With HubSyncCallback every sample is made by the newest version.",
        )
    steps = [row["step"] for row in rows]
    hover = "step %{x}: %{y:.3g} versions<extra></extra>"
    drawn = figure(
        260,
        _points(steps, [row[now] - row[oldest] for row in rows], "oldest weights of a sample", ORANGE, hover),
        xaxis=version_axis([int(step) for step in steps], "step"),
        yaxis={"title": {"text": "age (versions)"}, "rangemode": "tozero"},
        showlegend=True,
    )
    rows = [row for row in rows if newest in row]
    ages = [row[now] - row[newest] for row in rows]
    drawn.add_trace(_points([row["step"] for row in rows], ages, "newest weights", BLUE, hover))
    return Drawing(
        "staleness", title, "Versions between the weights that made a sample and the newest, by step.", drawn
    )


def scalars(log: TrainerLog | None) -> list[Drawing]:
    """Reward and other numbers of the log, the most telling ones first."""
    if log is None:
        return [Drawing("scalars", "Reward and other numbers", f"Not known. {_GIVE_A_LOG}")]
    names = [name for name in log.metrics if not name.startswith(SYNC) and name not in ("epoch", "num_tokens")]
    names = [name for name in names if len(set(log.series(name)[1])) > 1]
    if not names:
        return [Drawing("scalars", "Reward and other numbers", "No number of the log changes.")]
    first = [name for name in _FIRST_SCALARS if name in names]
    rewards = [name for name in names if name.startswith("rewards/") and name.endswith("mean")]
    chosen = list(dict.fromkeys([*first, *rewards, *names]))[:_MOST_SCALARS]
    drawings = [_scalar(log, name, number) for number, name in enumerate(chosen)]
    if len(names) > len(chosen):
        drawings.append(
            Drawing("more", "", f"{len(names) - len(chosen)} more numbers of the log change, and are not drawn.")
        )
    return drawings


def _scalar(log: TrainerLog, name: str, number: int) -> Drawing:
    steps, values = log.series(name)
    hover = "step %{x}: %{y:.4g}<extra></extra>"
    drawn = figure(
        210, xaxis=version_axis([int(step) for step in steps], "step"), yaxis={"tickformat": "~g"}, showlegend=False
    )
    window = len(values) // 12
    faint = 0.35 if window > 1 else 1.0
    drawn.add_trace(
        _points(steps, values, name, BLUE, hover).update(opacity=faint, mode="lines" if len(steps) > 1 else "markers")
    )
    if window > 1:
        mean = np.convolve(values, np.ones(window) / window, "valid")
        at = steps[(window - 1) // 2 :][: len(mean)]
        drawn.add_trace(
            _points(at, mean, "mean", BLUE, f"mean of {window}: %{{y:.4g}}<extra></extra>").update(
                mode="lines", line={"width": 2.5}
            )
        )
    drawn.update_layout(margin={"l": 48, "r": 12, "t": 8, "b": 40})
    return Drawing(f"scalar-{number}", name, "", drawn, small=True)
