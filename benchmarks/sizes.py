"""B0's cost against the size of the image: time and memory from 256x256 to 2048x2048, 150 classes, float32."""

import sys

from .inference import row_of
from .record import main

ROWS = {
    f"{side}x{side}": row_of(f"{side}x{side}", rounds, "b0", 1, side, side)
    for side, rounds in ((256, 15), (512, 9), (1024, 5), (2048, 3))
}

if __name__ == "__main__":
    sys.exit(main("sizes", ROWS, __doc__))
