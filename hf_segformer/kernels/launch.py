"""Launches of kernels: run on a GPU, or compiled without one."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
}


class Usage(NamedTuple):
    """Resources of a compiled kernel: registers per thread, bytes on the stack (spills), bytes of shared memory."""

    registers: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: a function decorated by `triton.jit`.
        grid: number of programs along each axis.
        arguments: tensors and numbers, in the kernel's order.
        constants: compile-time constants of the kernel.
        num_warps: number of warps, of 32 threads each.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Sequence[Tensor | int | float]
    constants: dict[str, Any]
    num_warps: int = 4

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options. Triton 3.10 will no longer fuse products and sums by default, and 3.9 warns about it."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}

    def run(self) -> None:
        """Run the kernel on the device of its tensors.

        Raises:
            ValueError: if the tensors are on several devices: a kernel would read another device's addresses.
        """
        tensors = [each for each in self.arguments if isinstance(each, Tensor)]
        if len(devices := {each.device for each in tensors}) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"tensors of one kernel are on {found}; expected one device")
        with torch.cuda.device_of(tensors[0]):
            self.kernel[self.grid](*self.arguments, **self.constants, **self.options)

    def compile(self, capability: int) -> Usage:
        """Compile for a compute capability (80, 90) and these arguments; no GPU is needed."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, attributes, constants = {}, {}, dict(self.constants)
        for place, (name, value) in enumerate(zip(self.kernel.arg_names, self.arguments, strict=False)):
            if isinstance(value, Tensor):
                signature[name] = _POINTERS[value.dtype]
            elif value == 1:
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[place,] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(self.constants, "constexpr")
        source = ASTSource(self.kernel, signature, constants, attributes)
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), self.options)
        return _usage(compiled.asm["cubin"])


def _usage(binary: bytes) -> Usage:
    """Read a compiled kernel's resources by `cuobjdump`, which is part of Triton."""
    program = files("triton") / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", output))
    return Usage(*(int(found[name]) for name in ("REG", "STACK", "SHARED")))


def accumulator(dtype: torch.dtype) -> Any:
    """Return the type that kernels compute in: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least the number."""
    return 1 << max(number - 1, 0).bit_length()


__all__ = ["Launch", "Usage", "accumulator", "power_of_2"]
