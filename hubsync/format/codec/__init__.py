"""The codec: a patch as records, code books, chunk rows and payload. docs/FORMAT.md is the specification."""

from .book import CLASSES_OF, columns
from .decode import decode
from .encode import Encoded, encode
from .grid import Grid
from .layout import RECORD_COLUMNS, OldBits

__all__ = ["CLASSES_OF", "RECORD_COLUMNS", "Encoded", "Grid", "OldBits", "columns", "decode", "encode"]
