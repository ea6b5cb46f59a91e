"""``python -m lrprobe`` is ``lrprobe``."""

import sys

from lrprobe.cli import main

if __name__ == "__main__":
    sys.exit(main())
