"""`python -m hf_segformer ...` and `torchrun -m hf_segformer ...`: the command `segformer`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
