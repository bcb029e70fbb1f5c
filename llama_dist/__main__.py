"""`python -m llama_dist` is `llama-dist`."""

import sys

from llama_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
