"""`python -m xpatch` is the `xpatch` command."""

import sys

from xpatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
