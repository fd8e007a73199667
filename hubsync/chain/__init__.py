"""What is committed in a run, in which order it is written, and how to get from one version to another."""

from .compaction import Compactor
from .layout import Layout
from .planner import Plan, Step
from .reader import ChainReader
from .version_info import VersionInfo
from .writer import ChainWriter

__all__ = ["ChainReader", "ChainWriter", "Compactor", "Layout", "Plan", "Step", "VersionInfo"]
