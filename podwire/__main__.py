"""`python -m podwire`: the same as the installed command `podwire`."""

import sys

from podwire.cli import main

if __name__ == "__main__":
    sys.exit(main())
