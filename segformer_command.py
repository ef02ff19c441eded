"""Entry point of the command `segformer`: arguments first, heavy imports last.

`import hf_segformer` registers the Auto classes, so it imports PyTorch and Transformers, which takes seconds. This
module is outside the package and puts the package into `sys.modules` without running its `__init__`. The argument
parsers then import without it, and `--help`, `--version` and usage errors answer at once. The package runs its
`__init__` when a command starts, or when anybody asks it for an attribute that it does not have yet: it is the same
module object before and after.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec
from types import ModuleType

_PACKAGE = "hf_segformer"


class _DeferredPackage(ModuleType):
    """A package whose `__init__` has not run yet; asking for an unknown attribute runs it."""

    def __getattr__(self, name: str):
        if name.startswith("__"):  # import machinery and debuggers probe for these
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        _execute(self)
        return getattr(self, name)


def defer_package() -> None:
    """Make submodules of the package importable without its `__init__`; no effect on a package that is imported."""
    if _PACKAGE in sys.modules:
        return
    spec = find_spec(_PACKAGE)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {_PACKAGE!r}", name=_PACKAGE)
    package = module_from_spec(spec)
    package.__class__ = _DeferredPackage
    sys.modules[_PACKAGE] = package


def load_package() -> None:
    """Run the `__init__` of a deferred package; Ctrl-C meanwhile ends the process in one line."""
    package = sys.modules[_PACKAGE]
    if isinstance(package, _DeferredPackage):
        with _immediate_interrupt():
            _execute(package)


def _execute(package: ModuleType) -> None:
    """Run the package's `__init__`; if it fails the package is not left half-imported, as after `import`."""
    package.__class__ = ModuleType
    loader = package.__spec__.loader  # type: ignore[union-attr]
    try:
        loader.exec_module(package)  # type: ignore[union-attr]
    except BaseException:
        sys.modules.pop(_PACKAGE, None)
        raise


@contextmanager
def _immediate_interrupt() -> Iterator[None]:
    """End the process at once on Ctrl-C.

    Libraries that are being imported may swallow a KeyboardInterrupt, or turn it into an error of their own; there is
    nothing to clean up yet.
    """

    def end_process(*_) -> None:
        os.write(2, b"segformer: interrupted\n")
        os._exit(130)

    try:
        is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        previous = signal.signal(signal.SIGINT, end_process) if is_default else None
    except ValueError:  # not the main thread, which gets no signals
        previous = None
    try:
        yield
    finally:
        if previous is not None:
            signal.signal(signal.SIGINT, previous)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 after an error, 2 after wrong usage, 130 after Ctrl-C.
    """
    try:
        with _immediate_interrupt():
            defer_package()
            from hf_segformer.cli.main import main as run
        return run(argv, load_package)
    finally:
        if argv is None:  # the process ends now: Ctrl-C while PyTorch shuts down must not print a traceback
            signal.signal(signal.SIGINT, signal.SIG_DFL)


__all__ = ["defer_package", "load_package", "main"]

if __name__ == "__main__":
    sys.exit(main())
