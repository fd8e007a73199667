"""Progress of what takes long, on a terminal only.

Bars are those of huggingface_hub (tqdm): on stderr, gone when the work ends, and off where stderr is no terminal or
`HF_HUB_DISABLE_PROGRESS_BARS=1` is set. What ends sooner than `SHOWN_AFTER_S` shows nothing.

    with progress("reading the base", nbytes) as shown:
        for block in blocks:
            shown.add(len(block))
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SHOWN_AFTER_S = 2.0
LEAST_BYTES = 16 << 20  # less is moved too often, and too soon, to be worth a bar

_is_off = False
_said: set[str] = set()


def _stderr() -> Any:
    return sys.stderr


def off() -> None:
    """Show nothing in this process from now on."""
    global _is_off
    _is_off = True


def is_shown() -> bool:
    """Whether there is a terminal to show something on."""
    try:
        return not _is_off and bool(_stderr().isatty())
    except (AttributeError, ValueError):  # no stderr, or a closed one
        return False


class Bar:
    """One bar, or none."""

    def __init__(self, bar: Any = None):
        self._bar = bar

    def add(self, amount: int = 1) -> None:
        """So much more is done."""
        if self._bar is not None:
            self._bar.update(amount)

    def at(self, done: int) -> None:
        """So much is done."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)


@contextmanager
def progress(what: str, total: int | None, unit: str = "B") -> Iterator[Bar]:
    """A bar for as long as the context lasts.

    Args:
        what: a few words.
        total: of what `add` adds up to; None if unknown.
        unit: of `total`; "B" is scaled (kB, MB, GB).
    """
    too_small = unit == "B" and total is not None and total < LEAST_BYTES
    if too_small or not is_shown():
        yield Bar()
        return
    from huggingface_hub.utils import tqdm

    scaled = unit == "B"
    what = what if len(what) <= 60 else what[:57] + "..."
    settings: dict[str, Any] = {"unit_scale": scaled, "unit_divisor": 1000, "leave": False, "delay": SHOWN_AFTER_S}
    with tqdm(total=total, desc=what, unit=unit, file=_stderr(), **settings) as bar:
        yield Bar(bar)


def say(text: str) -> None:
    """Print a line of output without tearing bars."""
    if not is_shown():
        print(text, flush=True)
        return
    from huggingface_hub.utils import tqdm

    with tqdm.external_write_mode(file=sys.stdout):
        print(text, flush=True)


def note(text: str, *, once: bool = False) -> None:
    """What begins now and takes a while, on stderr if that is a terminal. `once`: not again in this process."""
    if not is_shown() or (once and text in _said):
        return
    _said.add(text)
    from huggingface_hub.utils import tqdm

    with tqdm.external_write_mode(file=_stderr()):
        print(text, file=_stderr(), flush=True)
