"""Targets of an export: the writer of a file, and the runtime that verifies it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.export import ExportedProgram

from .aot_inductor import aoti_package, require_compiler, write_aoti
from .executorch_program import executorch_runtime, require_executorch, write_executorch
from .exportable import dynamic_axes
from .metadata import openvino_info
from .runtimes import Runtime, onnx_runtime, open_vino, quiet, require, torch_program

OPSET = 20  # the first with GELU as one operation
METADATA_FILE = "metadata.json"  # in the archive of torch.export


def write_onnx(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write an ONNX file with its weights and its `metadata_props` inside.

    Raises:
        ValueError: if a package is missing, or the weights exceed the 2 GB of one file.
    """
    require("onnx", "onnxscript")
    import onnx

    [name], [output] = program.graph_signature.user_inputs, ["segmentation" if _has_processing(program) else "logits"]
    with quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            dynamic_shapes=dynamic_axes(name),
            opset_version=OPSET,
            input_names=[name],
            output_names=[output],
            external_data=False,
            verbose=False,
        )
    graph = exported.model_proto
    for node in graph.graph.node:
        node.ClearField("metadata_props")  # paths of the source code on this machine
    onnx.helper.set_model_props(graph, dict(metadata))
    if graph.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise ValueError(f"the model takes {graph.ByteSize():,} bytes; expected at most 2 GB for an ONNX file")
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)


def write_openvino(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write OpenVINO's model.xml, with `model_info` inside, and the model.bin beside it, in float32.

    The smallest side is part of the graph's input shape, so that OpenVINO refuses smaller images. It would otherwise
    compute them without an error, and answer with the previous image's shape where a stage's grid becomes empty.
    """
    require("openvino")
    import openvino

    with quiet():
        converted = openvino.convert_model(program)
    [name] = program.graph_signature.user_inputs
    shape = converted.inputs[0].get_partial_shape()
    for axis, dim in dynamic_axes(name)[name].items():
        shape[axis] = openvino.Dimension(max(dim.min, 1), -1)
    converted.reshape(shape)
    for key, value in openvino_info(metadata).items():
        converted.set_rt_info(value, ["model_info", key])
    openvino.save_model(converted, path, compress_to_fp16=False)


def write_torch(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a file for torch.export.load, with metadata.json among its extra files."""
    torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(dict(metadata))})


def _has_processing(program: ExportedProgram) -> bool:
    return program.graph_signature.user_inputs == ("images",)


@dataclass(frozen=True)
class Target:
    """Export target: file name, writer, and the runtime that verifies it."""

    file: str
    write: Callable[[ExportedProgram, Path, Mapping[str, str]], None]  # the last: `metadata.describe_model`
    run: Callable[[Path], Runtime]
    runtime: str
    packages: tuple[str, ...] = ()
    check: Callable[[], None] | None = None  # raises ValueError where something else is missing


_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TARGETS: Mapping[str, Target] = {
    "onnx": Target("model.onnx", write_onnx, onnx_runtime, "ONNX Runtime", _ONNX_PACKAGES),
    "openvino": Target("model.xml", write_openvino, open_vino, "OpenVINO", ("openvino",)),
    "torch": Target("model.pt2", write_torch, torch_program, "torch.export"),
    "aoti": Target("model.pt2", write_aoti, aoti_package, "AOTInductor", check=require_compiler),
    "executorch": Target(
        "model.pte", write_executorch, executorch_runtime, "ExecuTorch", ("executorch.version",), require_executorch
    ),
    "web": Target("model.onnx", write_onnx, onnx_runtime, "ONNX Runtime", _ONNX_PACKAGES),
    "transformers.js": Target("onnx/model.onnx", write_onnx, onnx_runtime, "ONNX Runtime", _ONNX_PACKAGES),
}


__all__ = ["TARGETS", "Target", "write_onnx", "write_openvino", "write_torch"]
