"""All imports from hubsync that the golden files need."""

from hubsync.bucket import LocalBucket, SignedBucket
from hubsync.chain import ChainReader, ChainWriter, Compactor, Layout
from hubsync.chain.replay import replay
from hubsync.chain.version_info import VersionInfo
from hubsync.format.digest import digest_view
from hubsync.format.encoding import Encoding
from hubsync.format.keys import PublicKey, SigningKey
from hubsync.format.manifest import Adapter, Base, Head, Manifest, Part, Position, Run
from hubsync.format.parts import Transition, open_anchor, read_delta, write_adapter, write_anchor, write_delta
from hubsync.format.patch import Patch, TensorDelta, TensorValues, absolute, changed, changes_of, compose, invert
from hubsync.format.table import TensorSpec, TensorTable
from hubsync.format.times import Times
from hubsync.format.view_bits import ViewBits
from hubsync.kernels.bits import SIGNED, TORCH_DTYPES, bits_of

__all__ = [
    "SIGNED",
    "TORCH_DTYPES",
    "Adapter",
    "Base",
    "ChainReader",
    "ChainWriter",
    "Compactor",
    "Encoding",
    "Head",
    "Layout",
    "LocalBucket",
    "Manifest",
    "Part",
    "Patch",
    "Position",
    "PublicKey",
    "Run",
    "SignedBucket",
    "SigningKey",
    "TensorDelta",
    "TensorSpec",
    "TensorTable",
    "TensorValues",
    "Times",
    "Transition",
    "VersionInfo",
    "ViewBits",
    "absolute",
    "bits_of",
    "changed",
    "changes_of",
    "compose",
    "digest_view",
    "invert",
    "open_anchor",
    "read_delta",
    "replay",
    "write_adapter",
    "write_anchor",
    "write_delta",
]
