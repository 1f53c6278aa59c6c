"""``python -m fedpipe`` is ``fedpipe``."""

import sys

from fedpipe.cli import main

if __name__ == "__main__":
    sys.exit(main())
