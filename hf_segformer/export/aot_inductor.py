"""AOTInductor packages: a network compiled to machine code, which PyTorch runs without this package or Transformers.

A package belongs to the instruction set it was compiled on and to PyTorch's version. It is verified in a process of its
own, where neither this package nor Transformers can be imported.
"""

import io
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .runtimes import Runtime, quiet

# Reads sizes and tensors from its input until that ends, and answers in the same form.
_PROGRAM = """
import io, os, sys
answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # whatever libraries print
sys.modules["hf_segformer"] = sys.modules["transformers"] = None
import torch
torch.set_num_threads(int(sys.argv[2]))
network = torch._inductor.aoti_load_package(sys.argv[1])
while size := sys.stdin.buffer.read(8):
    content = io.BytesIO(sys.stdin.buffer.read(int.from_bytes(size, "little")))
    content_out = io.BytesIO()
    torch.save(network(torch.load(content, weights_only=True)), content_out)
    answers.write(len(content_out.getvalue()).to_bytes(8, "little") + content_out.getvalue())
    answers.flush()
"""


def require_compiler() -> None:
    """Raise ValueError where no C++ compiler is found."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ValueError(
            "no C++ compiler is found, which aoti (--to aoti) compiles with: apt-get install g++, or set CXX to one"
        ) from error


def write_aoti(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Compile a package for the processor of this machine, with the metadata inside.

    The number of threads is that of the process that runs it.

    Raises:
        ValueError: if there is no compiler, or it fails.
    """
    require_compiler()
    options: dict[str, Any] = {
        "aot_inductor.metadata": dict(metadata),
        "aot_inductor.check_lowerbound": False,  # it refuses batches of one image
        "cpp.dynamic_threads": True,
    }
    try:
        with quiet():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    except RuntimeError as error:
        [reason, *_] = [line for line in str(error).splitlines() if "error" in line.lower()] or [type(error).__name__]
        raise ValueError(f"the network cannot be compiled: {reason.strip()}") from error


class _Process:
    """Process that holds a package and answers inputs with outputs; it ends with this object."""

    def __init__(self, path: Path):
        self.name, self.errors = path.name, tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
        command = [sys.executable, "-c", _PROGRAM, str(path), str(torch.get_num_threads())]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, cwd=path.parent
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self.requests, self.answers = process.stdin, process.stdout
        self.end = weakref.finalize(self, _end, process)
        weakref.finalize(self, self.errors.close)

    def __call__(self, inputs: Tensor) -> Tensor:
        content = io.BytesIO()
        torch.save(inputs, content)
        with suppress(BrokenPipeError):  # the process has ended: its answer is empty
            self.requests.write(len(content.getvalue()).to_bytes(8, "little") + content.getvalue())
            self.requests.flush()
        size = self.answers.read(8)
        if not size:
            self.end()
            self.errors.seek(0)
            lines = self.errors.read().decode(errors="replace").strip().splitlines()
            raise ValueError(f"{self.name} does not run: {lines[-1] if lines else 'its process ended'}")
        return torch.load(io.BytesIO(self.answers.read(int.from_bytes(size, "little"))), weights_only=True)


def _end(process: subprocess.Popen) -> None:
    """End the input, so that the process ends, and wait for that."""
    process.communicate()


def aoti_package(path: str | Path) -> Runtime:
    """Load a package in a process that imports PyTorch alone, with the number of threads of this one."""
    return _Process(Path(path).resolve())


__all__ = ["aoti_package", "require_compiler", "write_aoti"]
