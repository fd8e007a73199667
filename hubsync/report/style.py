"""Colours and axes that all figures share, for light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"

# Of a lightness that is legible on white and on near-black, and told apart by colour-blind readers with the legend.
PHASE_COLOURS = {
    "detect": "#9b7ede",
    "encode": "#4a90d9",
    "upload": "#22a699",
    "stage": "#e8a33d",
    "commit": "#e0574f",
    "verify": "#8496a9",
}
BLUE, ORANGE, GREEN, RED, GREY = "#4a90d9", "#e8833a", "#22a699", "#e0574f", "#8496a9"
SERIES = [BLUE, ORANGE, GREEN, "#9b7ede", "#d4699f", "#a3862a", "#5b8c5a", GREY]


@dataclass(frozen=True)
class Drawing:
    """One figure of the page, or what to do so that there is one.

    Attributes:
        key: its name in the page.
        title: what is seen.
        caption: plain text below it; how to read it.
        figure: None if nothing was recorded; then the caption says how to record it.
        small: whether several fit beside each other.
    """

    key: str
    title: str
    caption: str = ""
    figure: go.Figure | None = None
    small: bool = False


def template(dark: bool) -> dict[str, Any]:
    """Layout defaults as JSON. The page draws every figure with that of its theme. `empty`: behind heat maps."""
    ink, grid = ("#c9d1d9", "#2c333d") if dark else ("#3b4350", "#e4e8ee")
    axis = {
        "gridcolor": grid,
        "linecolor": grid,
        "zerolinecolor": grid,
        "ticks": "",
        "automargin": True,
        "ticklabelstandoff": 4,
    }
    axis |= {"title": {"font": {"size": 12}, "standoff": 10}}
    box = {"bgcolor": "#1c2129" if dark else "#ffffff", "bordercolor": grid, "font": {"color": ink, "family": FONT}}
    layout = {
        "font": {"family": FONT, "size": 12, "color": ink},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": SERIES,
        "hoverlabel": {**box, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
        "xaxis": axis,
        "yaxis": axis,
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#6d7785", "activecolor": ink},
    }
    bar = {"outlinewidth": 0, "ticks": "", "thickness": 12}
    scale = _SCALE if dark else _SCALE[::-1]
    colours = [[at / (len(scale) - 1), colour] for at, colour in enumerate(scale)]
    empty = "#2a3039" if dark else "#e6e9ee"
    return {
        "empty": empty,
        "layout": layout,
        "data": {"heatmap": [{"type": "heatmap", "colorscale": colours, "colorbar": bar}]},
    }


# From few changes on a dark page to many; the other way round on a light one. One hue, so that lightness alone tells.
_SCALE = ["#16283c", "#1b4468", "#1f6694", "#3a8bbd", "#6fb1d9", "#abd3ec", "#e3f1fa"]


def figure(height: int, *traces: Any, **layout: Any) -> go.Figure:
    made = go.Figure(list(traces))
    margin = {"l": 56, "r": 16, "t": 28, "b": 44}
    made.update_layout(height=height, margin=margin, template=None, **layout)
    return made


def version_axis(versions: Sequence[int], title: str = "version") -> dict[str, Any]:
    """An axis of whole numbers."""
    few = not versions or max(versions) - min(versions) < 10
    return {"title": {"text": title}, "tickformat": "d", **({"dtick": 1} if few else {})}


def nbytes(count: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
