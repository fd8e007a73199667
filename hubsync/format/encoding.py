"""The encodings of a version. To add one, add a member here and its code books to `codec.book.CLASSES_OF`."""

from __future__ import annotations

from enum import Enum


class Encoding(str, Enum):
    """How the parts of a version hold its values. The value of a member is its name in manifests and delta parts."""

    FAST = "fast"  # a delta: differences by position
    COMPACT = "compact"  # a delta: differences by class of the old exponent, a third smaller or less
    DENSE = "dense"  # an anchor: the whole view

    @property
    def needs_base(self) -> bool:
        """Whether parts are decodable only with the parent version's weights."""
        return self is Encoding.COMPACT

    @property
    def invertible(self) -> bool:
        """Whether the parts alone lead back from the version to its parent."""
        return self is Encoding.FAST

    def __str__(self) -> str:
        return self.value
