"""Progress of the demo: one line per optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_WEIGHT_SYNC = "weight_sync/"
_CHANGED = _WEIGHT_SYNC + "changed_fraction"  # in the rows of publishes


@dataclass(frozen=True)
class _Column:
    """One column: a metric times `scale`, formatted with `form`, right-aligned in `width` characters."""

    heading: str
    metric: str
    width: int
    form: str
    scale: float = 1.0

    def cell(self, row: Mapping[str, float]) -> str:
        value = row.get(self.metric)
        return ("-" if value is None else self.form.format(self.scale * value)).rjust(self.width)


# Together 79 characters.
_COLUMNS = (
    _Column("step", "step", 4, "{:.0f}"),
    _Column("reward", "reward", 7, "{:.3f}"),
    _Column("version", _WEIGHT_SYNC + "version", 8, "{:.0f}"),
    _Column("changed", _CHANGED, 8, "{:.2%}"),
    _Column("payload", _WEIGHT_SYNC + "payload_bytes", 9, "{:.1f}kB", 1e-3),
    _Column("bits", _WEIGHT_SYNC + "bits_per_change", 6, "{:.2f}"),
    _Column("upload", _WEIGHT_SYNC + "upload_s", 7, "{:.2f}s"),
    _Column("stage", _WEIGHT_SYNC + "stage_s", 7, "{:.2f}s"),
    _Column("commit", _WEIGHT_SYNC + "commit_s", 8, "{:.1f}ms", 1e3),
    _Column("pause", _WEIGHT_SYNC + "pause_s", 7, "{:.0f}ms", 1e3),
)
_DIGEST = {None: "       -", 1.0: "[green]      ok[/]"}
_WRONG_DIGEST = "[red]   WRONG[/]"


class Progress(TrainerCallback):
    """Prints and keeps every row of the trainer's log.

    The version in a row is the one that earned the row's reward, with its stage, commit and pause: it was published
    after the previous step. What was changed and uploaded is of the row's own step. The digest belongs to the version
    before, and was checked while the server generated.
    """

    def __init__(self, console: Console):
        self.rows: list[dict[str, float]] = []
        self._console = console

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        headings = "".join(column.heading.rjust(column.width) for column in _COLUMNS)
        self._console.print(headings + "  digest", style="bold", soft_wrap=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs:
            return
        if "reward" in logs:
            self.rows.append({**logs, "step": state.global_step})
        elif self.rows and self.rows[-1]["step"] == state.global_step and _CHANGED in logs:
            self.rows[-1] |= {name: value for name, value in logs.items() if name.startswith(_WEIGHT_SYNC)}
            self._print(self.rows[-1])

    def _print(self, row: Mapping[str, float]) -> None:
        digest = _DIGEST.get(row.get(_WEIGHT_SYNC + "digest_ok"), _WRONG_DIGEST)
        cells = "".join(column.cell(row) for column in _COLUMNS)
        self._console.print(cells + digest, highlight=False, soft_wrap=True)
