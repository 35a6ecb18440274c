"""Run the command line as a module, as `accelerate launch -m vqzoo` does."""

import sys

from vqzoo.cli import main

if __name__ == "__main__":
    sys.exit(main())
