"""``python -m dtrp``: the command line, where ``dtrp`` itself is not on the path."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
