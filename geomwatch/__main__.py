"""`python -m geomwatch` is the command `geomwatch`."""

from __future__ import annotations

import sys

from geomwatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
