"""`python -m hubsync.localhub`: the same as `hubsync hub`, without loading anything else of hubsync."""

from __future__ import annotations

import argparse
import sys

from hubsync.cli import hub
from hubsync.errors import HubsyncError

parser = argparse.ArgumentParser(prog="python -m hubsync.localhub", description=hub.DESCRIPTION)
hub.add_arguments(parser)
try:
    sys.exit(hub.run(parser.parse_args()))
except HubsyncError as error:
    sys.exit(f"hubsync: {error}")
