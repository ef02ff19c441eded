"""Parser and dispatch of the command `segformer`.

Each command has a file of its own with `add_NAME(commands)`, which adds its parser and sets two functions: `check`
refuses wrong values and combinations before anything heavy is imported, `run` imports what it needs and does the work.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import NoReturn

from ..files import printable
from ..version import __version__
from .app import add_app
from .bench import add_bench
from .chips import add_chips
from .compare import add_compare
from .convert import add_convert
from .evaluate import add_evaluate
from .export import add_export
from .info import add_info
from .inspect import add_inspect
from .predict import add_predict
from .pretrain import add_pretrain
from .push import add_push
from .train import add_train

COMMANDS = (
    add_train,
    add_pretrain,
    add_evaluate,
    add_compare,
    add_inspect,
    add_predict,
    add_chips,
    add_export,
    add_convert,
    add_push,
    add_app,
    add_info,
    add_bench,
)


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose options may stand before, between and after the arguments."""

    _is_intermixing = False

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args=None, namespace=None):
        """Parse; a command's arguments may be interleaved with its options."""
        if self._subparsers is not None or self._is_intermixing:
            return super().parse_known_args(args, namespace)
        self._is_intermixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_intermixing = False

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line."""
        self.exit(2, f"segformer: {' '.join(message.split())} (see {self.prog} --help)\n")


def build_parser() -> tuple[CommandParser, dict[str, CommandParser]]:
    """Return the parser, and those of its commands by name."""
    parser = CommandParser(
        prog="segformer", description="SegFormer for Transformers: train, evaluate, predict, deploy."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for add_command in COMMANDS:
        add_command(commands)
    for each in (parser, *commands.choices.values()):
        each.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors")
    parser.set_defaults(debug=False, check=None, loads_package=True)
    return parser, dict(commands.choices)


def main(argv: Sequence[str] | None = None, load_package: Callable[[], None] = lambda: None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; those of the process by default.
        load_package: called before the command runs; where the package's `__init__` was deferred it runs it.

    Returns:
        The exit status: 0, 1 after an error, 2 after wrong usage, 130 after Ctrl-C.
    """
    status = 2
    try:
        arguments = parse(sys.argv[1:] if argv is None else list(argv))
        with one_line_errors(arguments.debug):
            if arguments.check is not None:
                arguments.check(arguments)
            status = 1
            if arguments.loads_package:
                load_package()
            arguments.run(arguments)
            sys.stdout.flush()
            status = 0
    except SystemExit as end:  # of the parser: help, version or wrong usage
        status = int(end.code or 0)
    except BrokenPipeError:
        # The reader has left; what is still buffered must not be flushed into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("segformer: interrupted", file=sys.stderr)
        status = 130
    return status


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse arguments; exits with one line where one is unknown, with the nearest name."""
    parser, commands = build_parser()
    command = next((argument for argument in argv if not argument.startswith("-")), None)
    if command is not None and command not in commands:
        hint = _nearest(command, commands) or f"expected one of {', '.join(commands)}"
        parser.error(f"unknown command {command!r}; {hint}")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        parser = commands[arguments.command]
        option = next((argument.partition("=")[0] for argument in unknown if argument.startswith("-")), None)
        if option is None:
            parser.error(f"unexpected argument {unknown[0]!r}")
        hint = _nearest(option, [name for action in parser._actions for name in action.option_strings])
        parser.error(f"unknown option {option!r}" + (f"; {hint}" if hint else ""))
    return arguments


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name that is nearest to a misspelt one; empty if none is near."""
    near = [each for each in known if len(name) > 2 and each.startswith(name)] or get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


@contextmanager
def one_line_errors(debug: bool = False) -> Iterator[None]:
    """Print an error as one line on stderr, after its traceback where that is wanted, and continue after the block."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError, ImportError) as error:
        if debug:
            traceback.print_exc()
        print(f"segformer: {format_error(error)}", file=sys.stderr)


def format_error(error: Exception) -> str:
    """Return the message of an error in one line, without the number that the system's errors begin with."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return printable(f"{error.filename}: {error.strerror}")
    return printable(" ".join(str(error).split()))


__all__ = ["COMMANDS", "CommandParser", "build_parser", "format_error", "main", "one_line_errors", "parse"]
