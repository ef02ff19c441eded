"""ONNX files in shorter types: float16, and int8 by ONNX Runtime's quantisers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from .runtimes import quiet, require

KINDS = ("dynamic", "static")
# What a sum over channels could lose in float16: kernels that do not widen by themselves overflow at 65,504.
_FULL = ("LayerNormalization", "Softmax")


def to_float16(source: Path, destination: Path) -> None:
    """Weights and arithmetic in float16, but for LayerNorm and softmax; inputs and outputs stay float32."""
    require("onnx", "onnxruntime")
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with quiet():
        converted = convert_float_to_float16(
            onnx.load(source), keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_FULL]
        )
    converted.graph.ClearField("value_info")  # says float16 of what stays float32; whoever needs types infers them
    _keep_first(converted.graph.node)
    OnnxModel(converted).topological_sort()  # the casts of inputs were added last
    onnx.checker.check_model(converted, full_check=True)
    onnx.save(converted, destination)


def _keep_first(nodes: Any) -> None:
    """Drop casts that are there already: the converter adds one for each layer that a weight is shared by."""
    seen: set[str] = set()
    for node in list(nodes):
        if node.op_type == "Cast" and node.output[0] in seen:
            nodes.remove(node)
        seen.update(node.output)


def to_int8(source: Path, destination: Path, calibration: Iterable[Tensor] | None = None) -> None:
    """Weights in eight bits, with a scale a channel.

    Without pictures to calibrate on, what flows into a product is quantised by its own range at run time (dynamic).
    This is done for matrix products only: ONNX Runtime's convolutions of that kind are slower than float32. With
    pictures, ranges are those that were seen on them (static), and convolutions are quantised, too.

    Args:
        source: an ONNX file in float32.
        destination: file to write.
        calibration: pixel values, each (B, C, H, W), of which one at a time is held; None for dynamic.
    """
    require("onnx", "onnxruntime")
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    weights: dict[str, Any] = {"per_channel": True, "weight_type": QuantType.QInt8}
    with quiet():
        if calibration is None:
            quantize_dynamic(source, destination, op_types_to_quantize=["MatMul"], **weights)
        else:
            quantize_static(
                source,
                destination,
                _reader(calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Conv"],
                activation_type=QuantType.QUInt8,
                **weights,
            )


def _reader(inputs: Iterable[Tensor]) -> Any:
    """What ONNX Runtime takes pictures to calibrate on from."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(inputs)

        def get_next(self) -> dict[str, Any] | None:
            pixel_values = next(self.rest, None)
            return None if pixel_values is None else {"pixel_values": pixel_values.numpy()}

    return Reader()
