"""What the programs share: how they end."""

import sys
from collections.abc import Callable


def run_program(action: Callable[[], int], debug: bool) -> int:
    """Run a program and turn what went wrong into one line.

    Args:
        action: the program; it returns its exit code.
        debug: let errors through, with where they come from.

    Returns:
        exit code: that of the action, 1 after an error, 130 after Ctrl-C.
    """
    try:
        return action()
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
