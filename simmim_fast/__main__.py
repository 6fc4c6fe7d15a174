"""`python -m simmim_fast` is `simmim-fast`."""

import sys

from simmim_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
