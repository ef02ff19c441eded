"""What the programs share: the recipe on their command line, the look at where they write, and how they end."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory


def add_recipe(parser: argparse.ArgumentParser, example: str) -> None:
    """Add the arguments `recipe`, `overrides` and `--debug`.

    Args:
        parser: of the program.
        example: an override that suits it.
    """
    parser.add_argument("recipe", type=Path, help="TOML file, for example configuration/shapes_b0.toml")
    parser.add_argument("overrides", nargs="*", metavar="table.key=value", help=f"set a value, for example {example}")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def check_writable(folder: Path, setting: str) -> None:
    """See that a folder, or what it will be made in, can be written to, before hours are spent; nothing is left there.

    Args:
        folder: need not exist.
        setting: by which another one is given.

    Raises:
        OSError: if it can not.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        raise OSError(
            f"{folder} can not be written to, {nearest} says {error.strerror!r}: name another folder by {setting}"
        ) from error


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
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        print(f"error: {_in_one_line(error)}", file=sys.stderr)
        return 1


def _in_one_line(error: Exception) -> str:
    text = str(error)
    if "Original Traceback" in text:  # PyTorch's way to hand on what went wrong in a loader's worker
        text = re.split(rf"^(?:[\w.]+\.)?{type(error).__name__}: ", text, flags=re.MULTILINE)[-1]
    return " ".join(text.split())
