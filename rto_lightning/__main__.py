"""Lets `python -m rto_lightning` stand for the `rto-lightning` command."""

import sys

from rto_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
