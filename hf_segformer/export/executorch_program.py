"""ExecuTorch programs for phones and small devices, lowered to XNNPACK's kernels.

ExecuTorch plans its memory in advance, for the largest image; smaller ones run in the same program. A program takes one
image at a time. Operations that XNNPACK lacks (LayerNorm, for one) run in ExecuTorch's portable kernels.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .runtimes import Runtime, quiet


@contextmanager
def _silent() -> Iterator[None]:
    """Silence warnings and log lines of ExecuTorch and torchao."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def require_executorch() -> None:
    """Raise ValueError where ExecuTorch is missing, or does not load with this version of PyTorch."""
    try:
        found = version("executorch")
    except PackageNotFoundError as error:
        raise ValueError("executorch is not installed: pip install 'hf-segformer[executorch]'") from error
    try:
        with _silent():
            import executorch.backends.xnnpack.partition.xnnpack_partitioner
            import executorch.exir
            import executorch.runtime  # noqa: F401
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(
            f"executorch {found} does not load with torch {torch.__version__} ({reason}); expected versions that "
            "belong together: pip install 'hf-segformer[executorch]'"
        ) from error


def write_executorch(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Lower a network to a .pte file, with a method that returns it for each entry of the metadata.

    Raises:
        ValueError: if ExecuTorch is missing or does not fit.
    """
    require_executorch()
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with _silent():
        lowered = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods=dict(metadata)
        )
        path.write_bytes(lowered.to_executorch().buffer)


def executorch_runtime(path: str | Path) -> Runtime:
    """Load a .pte file in ExecuTorch; batches run image by image.

    The runtime raises ValueError for an image that exceeds the planned memory.
    """
    require_executorch()
    from executorch.runtime import Runtime as ExecuTorch

    program = ExecuTorch.get().load_program(path)
    method = program.load_method("forward")
    bound = tuple(method.metadata.input_tensor_meta(0).sizes())

    def run(inputs: Tensor) -> Tensor:
        shape = (1, *inputs.shape[1:])
        if any(side > largest for side, largest in zip(shape, bound, strict=True)):
            raise ValueError(
                f"an image enters the network as {_sizes(shape)}; expected at most {_sizes(bound)}: export with a "
                "larger max_size (--max-size)"
            )
        return torch.cat([_first(method.execute([image[None].contiguous()])) for image in inputs])

    return run


def _first(outputs: Any) -> Tensor:
    """Copy the output out of the memory that the next call overwrites."""
    return outputs[0].clone()


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


__all__ = ["executorch_runtime", "require_executorch", "write_executorch"]
