"""`python -m ketchup_cache` is `ketchup-cache`."""

import sys

from ketchup_cache.cli import main

if __name__ == "__main__":
    sys.exit(main())
