"""`python -m hubsync.localhub --root DIR`: a local Hub as a process of its own. The same as `hubsync hub`."""

from __future__ import annotations

import sys

from hubsync.cli.main import main

sys.exit(main(["hub", *sys.argv[1:]]))
