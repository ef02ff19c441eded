"""Conversion of ONNX files to float16, and to int8 by ONNX Runtime's quantisers."""

from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import Tensor

from .runtimes import quiet, require

KINDS = ("dynamic", "static")
# Sums over channels, which overflow at 65,504 in kernels that accumulate in float16.
_FULL = ("LayerNormalization", "Softmax")
_FIRST = "Conv"  # the network's first operation; in the order of an ONNX graph, resizing and normalisation precede it


def to_float16(source: Path, destination: Path) -> None:
    """Convert weights and arithmetic to float16, except LayerNorm and softmax; inputs and outputs stay float32."""
    require("onnx", "onnxruntime")
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with quiet():
        converted = convert_float_to_float16(
            onnx.load(source), keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_FULL]
        )
    converted.graph.ClearField("value_info")  # wrong for tensors that stay float32; runtimes infer types
    _keep_first(converted.graph.node)
    OnnxModel(converted).topological_sort()  # the casts of inputs were added last
    onnx.checker.check_model(converted, full_check=True)
    onnx.save(converted, destination)


def _keep_first(nodes: Any) -> None:
    """Drop duplicate casts: the converter adds one for each layer that shares a weight."""
    seen: set[str] = set()
    for node in list(nodes):
        if node.op_type == "Cast" and node.output[0] in seen:
            nodes.remove(node)
        seen.update(node.output)


def to_int8(source: Path, destination: Path, calibration: Iterable[Tensor] | None = None) -> None:
    """Quantise weights to eight bits, with a scale a channel.

    Dynamic quantisation, without calibration images, quantises the activations of matrix products by their range at run
    time; ONNX Runtime's dynamic convolutions are slower than float32 and left alone. Static quantisation takes the
    ranges from calibration images, and quantises convolutions, too. Processing that the graph contains stays exact.

    Args:
        source: an ONNX file in float32.
        destination: file to write.
        calibration: inputs of the graph, each a batch, read one at a time; None for dynamic.
    """
    require("onnx", "onnxruntime")
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    graph = onnx.load(source).graph
    weights: dict[str, Any] = {"per_channel": True, "weight_type": QuantType.QInt8}
    weights["nodes_to_exclude"] = [node.name for node in takewhile(lambda node: node.op_type != _FIRST, graph.node)]
    with quiet():
        if calibration is None:
            quantize_dynamic(source, destination, op_types_to_quantize=["MatMul"], **weights)
        else:
            quantize_static(
                source,
                destination,
                _reader(graph.input[0].name, calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Conv"],
                activation_type=QuantType.QUInt8,
                **weights,
            )


def _reader(name: str, inputs: Iterable[Tensor]) -> Any:
    """Wrap calibration inputs, of that name, for ONNX Runtime."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(inputs)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.rest, None)
            return None if batch is None else {name: batch.numpy()}

    return Reader()


__all__ = ["KINDS", "to_float16", "to_int8"]
