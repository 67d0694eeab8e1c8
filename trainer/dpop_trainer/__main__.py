"""`python -m dpop_trainer` is the console command `dpop`."""

import sys

from dpop_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main())
