"""Rows of publish metrics in a trainer's log.

A publish ends in the background, after the trainer has logged the step that made it. So its metrics are a row of their
own with the number of that step, as those of an evaluation are. They follow the trainer's rhythm: each row that it logs
is followed by one with the means of the publishes since the row before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean

Values = Mapping[str, float]


class PublishRows:
    """Collects the metrics of publishes, and logs them once their step's row was logged.

    Args:
        log: logs values as a row of a step.
    """

    def __init__(self, log: Callable[[dict[str, float], int], None]):
        self._log = log
        self._made: dict[int, Values] = {}
        self._due: list[int] = []  # steps whose rows were logged
        self._newest = 0

    def made(self, step: int, values: Values) -> None:
        """A step's publish has ended. Each step counts once."""
        if step > self._newest:
            self._newest = step
            self._made[step] = values

    def logged(self, step: int) -> None:
        """The trainer has logged its row of a step."""
        if step not in self._due:
            self._due.append(step)

    def flush(self) -> None:
        """Log what is known of steps whose rows were logged. All publishes up to now have ended."""
        due, self._due = self._due, []
        for step in due:
            of_row = [self._made.pop(made) for made in sorted(self._made) if made <= step]
            if of_row:
                names = dict.fromkeys(name for values in of_row for name in values)
                self._log({name: fmean(v[name] for v in of_row if name in v) for name in names}, step)
