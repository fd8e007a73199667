"""`python -m hubsync` is the `hubsync` command."""

import sys

from hubsync.cli.main import main

sys.exit(main())
