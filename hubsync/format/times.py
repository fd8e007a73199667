"""When a version was made, as its manifest states it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from hubsync.errors import FormatError

from .documents import Fields


@dataclass(frozen=True)
class Times:
    """When a version was made: begin and end of each phase, in seconds since 1970, by the publishers' clocks.

    With several ranks, from the first that began to the last that ended. Information only.
    """

    detect: tuple[float, float]
    encode: tuple[float, float]
    upload: tuple[float, float]

    @classmethod
    def from_json(cls, doc: object) -> Times:
        """Parse the JSON object; FormatError on anything unexpected."""
        what = "manifest: times"
        if not isinstance(doc, dict):
            raise FormatError(f"{what}: must be an object")
        phases = {}
        for phase in (f.name for f in fields(cls)):
            ends = doc.get(phase)
            if not isinstance(ends, list) or len(ends) != 2:
                raise FormatError(f"{what}: {phase} must be two numbers")
            of = Fields({"begin": ends[0], "end": ends[1]}, f"{what}: {phase}")
            phases[phase] = of.seconds("begin"), of.seconds("end")
        return cls(**phases)

    @classmethod
    def spanning(cls, times: Sequence[Times]) -> Times:
        """From the first begin to the last end of each phase."""
        return cls(
            **{
                f.name: (min(getattr(one, f.name)[0] for one in times), max(getattr(one, f.name)[1] for one in times))
                for f in fields(cls)
            }
        )
