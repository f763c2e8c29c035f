"""``python -m sparseattn`` is the command ``sparseattn``."""

import sys

from sparseattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
