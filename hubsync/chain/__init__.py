"""What is committed in a run, in which order it is written, and how to get from one version to another."""

from .compaction import Compactor
from .layout import Layout
from .reader import ChainReader
from .ways import Plan, Step
from .writer import ChainWriter

__all__ = ["ChainReader", "ChainWriter", "Compactor", "Layout", "Plan", "Step"]
