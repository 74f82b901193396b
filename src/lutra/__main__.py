"""``python -m lutra``."""

import sys

from lutra.cli import main

if __name__ == "__main__":
    sys.exit(main())
