"""Run the benchmark suite: this library beside its peers, and the goals. See ``suite``."""

from __future__ import annotations

import sys

from suite.cli import main

if __name__ == "__main__":
    sys.exit(main())
