"""Facts that a trainer records with a version."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VersionInfo:
    """Facts recorded with a version, besides its weights.

    Attributes:
        step: the trainer's optimizer step; None if unknown.
        name: free text; None for none.
        serve: whether replicas that follow the run serve the version. Otherwise it is only saved, and replicas stay
            with the version that they serve.
        expires: seconds since 1970, after which retention may delete the version; None for never.
    """

    step: int | None = None
    name: str | None = None
    serve: bool = True
    expires: float | None = None


NO_INFO = VersionInfo()
