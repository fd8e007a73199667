"""Write the page: one file that needs no network and no server.

Plotly draws it. It has all of these plots, with zoom and tooltips; its Python package holds its JavaScript, so that the
page can carry it; and it draws one figure in the colours of two themes. The page's own policy
(`Content-Security-Policy`) forbids every request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from html import escape
from importlib.resources import files
from statistics import median

import hubsync

from . import figures, timeline
from .gather import PUSHED, Gathered
from .style import Drawing, duration, nbytes, template

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)
_DASH = "–"

Section = tuple[str, str, list[Drawing], str]  # key, heading, drawings, and HTML before them


def page(run: Gathered) -> str:
    """The whole page as HTML."""
    from plotly.offline import get_plotlyjs

    sections = _sections(run)
    drawn = [drawing for _, _, drawings, _ in sections for drawing in drawings if drawing.figure is not None]
    data = {drawing.key: json.loads(drawing.figure.to_json()) for drawing in drawn if drawing.figure is not None}
    for drawing in data.values():
        drawing["layout"].pop("template", None)
    templates = {"light": template(False), "dark": template(True)}
    links = " ".join(f'<a href="#{key}">{escape(heading)}</a>' for key, heading, _, _ in sections)
    source = files("hubsync.report")
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
            f"<title>hubsync run {escape(run.run.run_id[:8])}</title>",
            f"<style>{source.joinpath('page.css').read_text()}</style></head><body>",
            f"<header><div><h1>Run {escape(run.run.run_id[:8])}</h1><p class=soft>{escape(run.address)}, "
            f"read {_time(run.made)}</p><nav>{links}</nav></div>"
            '<button id="theme" type="button">Dark</button></header>',
            "<main><noscript><p class=card>The figures of this page need JavaScript.</p></noscript>",
            f'<div class="tiles">{_tiles(run)}</div>',
            *(_section(*section) for section in sections),
            f"</main><footer class=soft>hubsync {escape(hubsync.__version__)}. Drawn with Plotly.js (MIT).</footer>",
            f'<script type="application/json" id="figures">{_json(data)}</script>',
            f'<script type="application/json" id="templates">{_json(templates)}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>{source.joinpath('page.js').read_text()}</script></body></html>\n",
        ]
    )


def _sections(run: Gathered) -> list[Section]:
    return [
        ("run", "The run", [], _card(_facts(run))),
        ("sizes", "Size of each version", figures.sizes(run), ""),
        ("where", "Where weights change", figures.heat_maps(run), ""),
        ("timeline", "Timeline", timeline.phases(run), ""),
        ("lag", "Replicas", [timeline.replicas(run)], _servers(run)),
        ("stored", "What is stored", [figures.storage(run)], ""),
        ("samples", "Samples", [figures.staleness(run.log)], ""),
        ("training", "Training", figures.scalars(run.log), ""),
    ]


def _section(key: str, heading: str, drawings: Sequence[Drawing], before: str) -> str:
    large, small = [d for d in drawings if not d.small], [d for d in drawings if d.small]
    pairs = key in ("sizes", "timeline") and len(large) > 2
    body = ""
    if pairs:
        body += f'<div class="grid">{"".join(map(_drawing, large[:2]))}</div>'
    body += f'<div class="grid three">{"".join(map(_drawing, small))}</div>' if small else ""
    body += "".join(map(_drawing, large[2:] if pairs else large))
    return f'<section id="{key}"><h2>{escape(heading)}</h2>{before}{body}</section>'


def _drawing(drawing: Drawing) -> str:
    title = f"<h3>{escape(drawing.title)}</h3>" if drawing.title else ""
    caption = f'<p class="caption">{_text(drawing.caption)}</p>' if drawing.caption else ""
    if drawing.figure is None:
        return f'<div class="card" data-missing="{drawing.key}">{title}{caption}</div>'
    height = drawing.figure.layout.height
    label = escape(drawing.title, quote=True)
    place = f'<div class="figure" id="{drawing.key}" role="img" aria-label="{label}" style="height:{height}px"></div>'
    return f'<div class="card">{title}{place}{caption}</div>'


def _text(plain: str) -> str:
    """Escaped, with `code` between backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(plain.strip()))


def _json(document: object) -> str:
    """JSON that cannot end a script element."""
    return json.dumps(document, separators=(",", ":")).replace("<", "\\u003c")


# --- facts ------------------------------------------------------------------------------------------------


def _tiles(run: Gathered) -> str:
    deltas, table = [delta for delta in run.deltas if delta.changed], run.run.table
    payload = sum(delta.nbytes for delta in deltas)
    tiles = [(f"{len(run.deltas):,}", "versions"), (_count(table.numel), f"weights, {nbytes(table.nbytes)}")]
    if deltas:
        share = median(delta.changed for delta in deltas) / max(1, table.numel)
        size = median(delta.nbytes for delta in deltas)
        bits = 8 * payload / sum(delta.changed for delta in deltas)
        tiles += [
            (f"{100 * share:.2g} %", "of the weights changed in a version (median)"),
            (nbytes(size), f"a version (median); all weights are {table.nbytes / max(1, size):,.0f} times that"),
            (f"{bits:.2f}", "bits for each changed weight"),
        ]
    delays = [
        event.time - run.durable[event.version]
        for event in run.commits
        if event.kind == "commit" and event.server != PUSHED and event.time is not None and event.version in run.durable
    ]
    if delays := [delay for delay in delays if delay >= 0]:
        tiles.append((duration(median(delays)), "from durable to served (median)"))
    return "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in tiles
    )


def _count(number: float) -> str:
    for unit in ("", " thousand", " million", " billion"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} trillion"


def _facts(run: Gathered) -> str:
    document, table = run.run, run.run.table
    base = document.base.model or "made in memory; its weights are the anchor of version 0"
    revision = f" at {document.base.revision}" if document.base.revision else ""
    dtypes = sorted({spec.dtype for spec in table})
    encodings = sorted({str(delta.encoding.value) for delta in run.deltas})
    epochs = sorted({manifest.epoch for manifest in [*run.deltas, *run.anchors]})
    steps = [delta.step for delta in run.deltas if delta.step is not None]
    payload = sum(manifest.nbytes for manifest in [*run.deltas, *run.anchors, *run.merged])
    last = max([document.created, *run.durable.values()])
    rows = [
        ("run", document.run_id),
        ("version 0", base + revision),
        ("view", _view(run)),
        ("tensors", f"{len(table):,} with {table.numel:,} elements, {', '.join(dtypes)}"),
        ("began", f"{_time(document.created)}, newest version {duration(max(0.0, last - document.created))} later"),
        ("newest", f"{run.newest}" + (f", step {steps[-1]}" if steps else "")),
        ("served", f"{run.served}"),
        (
            "stored",
            f"{nbytes(payload)}; deltas: {len(run.deltas)}, merged: {len(run.merged)}, anchors: {len(run.anchors)}",
        ),
        ("encoding", ", ".join(encodings) or _DASH),
        ("writers", f"{len(epochs)} ({', '.join(epochs[-3:])})" if epochs else _DASH),
        ("signed", f"by {document.public_key[:16]}..." if document.public_key else "no"),
    ]
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="facts">{cells}</table>'


def _view(run: Gathered) -> str:
    adapter = run.run.adapter
    if adapter is None:
        return "the whole model"
    return f"a LoRA adapter of rank {adapter.config.get('r')} for {adapter.base.model or 'a model made in memory'}"


def _servers(run: Gathered) -> str:
    rows = []
    for seen in run.servers:
        status = seen.status
        position = None if status is None else status.position
        looks = None if status is None else status.verification
        rows.append(
            [
                seen.url,
                "unreachable" if status is None else status.state,
                _DASH if position is None else str(position.version),
                _DASH if position is None else str(run.served.version - position.version),
                _DASH if looks is None or looks.age_s is None else f"{duration(looks.age_s)} before",
                _phases({} if status is None else status.seconds),
                "" if seen.error is None else str(seen.error),
            ]
        )
    said = _table("Servers when this page was made", rows)
    rows = [
        [
            f"{seen.server} on {seen.host}",
            seen.state,
            _DASH if seen.version is None else str(seen.version),
            _DASH if seen.version is None else str(run.served.version - seen.version),
            _DASH if seen.verified_age_s is None else f"{duration(seen.verified_age_s)} before",
            _phases(seen.seconds),
            seen.error or (f"said {_time(seen.written)}" if seen.written else ""),
        ]
        for seen in run.reported
    ]
    said += _table("Reported by followers in the bucket (not proved)", rows)
    hint = "Statuses of servers: `--server URL`, or `hubsync follow --report-status` for those that cannot be reached."
    return said or _card(f'<p class="caption">{_text(hint)}</p>')


def _table(title: str, rows: Iterable[Sequence[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    if not body:
        return ""
    head = ("server", "state", "version", "lag", "verified", "last phases", "")
    heads = "".join(f"<th>{name}</th>" for name in head)
    return _card(f'<h3>{title}</h3><div class="scroll"><table><tr>{heads}</tr>{body}</table></div>')


def _card(html: str) -> str:
    return f'<div class="card">{html}</div>'


def _phases(seconds: object) -> str:
    items = seconds.items() if hasattr(seconds, "items") else ()
    return ", ".join(f"{name} {duration(value)}" for name, value in items) or _DASH


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
