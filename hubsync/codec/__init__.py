"""The codec: the changes of one tensor as an integer table row, chunk rows and a payload of bits."""

from .grid import Grid
from .streams import CHUNK_COLUMNS
from .tensor import RECORD_COLUMNS, TENSOR, EncodedTensor, decode_tensor, encode_tensor

__all__ = ["CHUNK_COLUMNS", "RECORD_COLUMNS", "TENSOR", "EncodedTensor", "Grid", "decode_tensor", "encode_tensor"]
