"""The same answers elsewhere: a segmentation model as a file for ONNX Runtime, OpenVINO, torch.export, transformers.js.

A file counts as exported once it was read back by its own runtime and gave PyTorch's answers, at several sizes and
numbers of pictures, on random pictures and on those that are given. How near they are is written beside it.

Axes: B pictures, C bands, H W a picture's sides, K classes, h w sides of the logits.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ..conversion.to_transformers import transformers_config, transformers_processor
from ..evaluation.evaluate import Evaluation, evaluate
from ..files import write_json
from ..image_processing_segformer import SegFormerImageProcessor
from ..modeling_segformer import SegFormerForSemanticSegmentation
from ..version import __version__
from .exportable import MIN_SIDE, DeployedSegFormer, PicturesToLabels, dynamic_axes, outside, trace
from .quantization import KINDS, to_float16, to_int8
from .runtimes import (
    Runtime,
    RuntimeModel,
    onnx_runtime,
    open_vino,
    quiet,
    require,
    summarise,
    torch_program,
)
from .transformers_js import check_in_node
from .verification import ReferenceOutputs, opened

OPSET = 20  # the first with GELU as one operation
TOLERANCE = 1e-4  # of the largest logit, in float32
RESIZE_TOLERANCE = 2e-2  # likewise, where the graph resizes: PIL rounds half-way sums to the other grey level at times
NEAR = 0.99  # share of equal labels below which a shorter type deserves a warning
_FLOAT16, _INT8 = "model_fp16.onnx", "model_quantized.onnx"  # as transformers.js calls them


def write_onnx(program: ExportedProgram, path: Path) -> None:
    """An ONNX file with its weights inside.

    Raises:
        ValueError: if a package is missing, or the weights are more than the 2 GB that one file holds.
    """
    require("onnx", "onnxscript")
    import onnx

    [name], [output] = program.graph_signature.user_inputs, ["labels" if _is_labelling(program) else "logits"]
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
        node.ClearField("metadata_props")  # where each line of code lay on this machine
    if graph.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise ValueError(f"the model takes {graph.ByteSize():,} bytes, but an ONNX file holds 2 GB at most")
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)


def write_openvino(program: ExportedProgram, path: Path) -> None:
    """OpenVINO's model.xml and the model.bin beside it, in float32."""
    require("openvino")
    import openvino

    with quiet():
        converted = openvino.convert_model(program)
    openvino.save_model(converted, path, compress_to_fp16=False)


def write_torch(program: ExportedProgram, path: Path) -> None:
    """A file that torch.export.load reads."""
    torch.export.save(program, path)


@dataclass(frozen=True)
class Target:
    """A kind of file: its name, what writes it and what runs it."""

    file: str
    write: Callable[[ExportedProgram, Path], None]
    run: Callable[[Path], Runtime]
    runtime: str
    packages: tuple[str, ...]


_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TARGETS: Mapping[str, Target] = {
    "onnx": Target("model.onnx", write_onnx, onnx_runtime, "ONNX Runtime", _ONNX_PACKAGES),
    "openvino": Target("model.xml", write_openvino, open_vino, "OpenVINO", ("openvino",)),
    "torch": Target("model.pt2", write_torch, torch_program, "torch.export", ()),
    "transformers.js": Target("onnx/model.onnx", write_onnx, onnx_runtime, "ONNX Runtime", _ONNX_PACKAGES),
}


@dataclass(frozen=True, eq=False)
class ExportConfig:
    """What to export a model to, and what to compare on.

    Args:
        target: one of `TARGETS`.
        with_processing: pictures in, label maps out: see `PicturesToLabels`.
        float16: an ONNX file in float16 beside the one in float32.
        int8: "dynamic" or "static" for an ONNX file in eight bits beside it.
        calibration: pictures from which static int8 learns the ranges of what flows through the network; paths, or
            whatever the image processor takes.
        pictures: to compare on, beside random ones; likewise.
        labelled: rows with `image` and `label`, as `evaluation.evaluate` takes them, to measure mean IoU on, in PyTorch
            and in each file.

    Raises:
        ValueError: if the target is unknown, or does not go with an option.
    """

    target: str
    with_processing: bool = False
    float16: bool = False
    int8: str | None = None
    calibration: Sequence[Any] = ()
    pictures: Sequence[Any] = ()
    labelled: Any = ()

    def __post_init__(self):
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}, but it must be one of {', '.join(TARGETS)}")
        if self.int8 is not None and self.int8 not in KINDS:
            raise ValueError(f"int8 is {self.int8!r}, but it must be one of {', '.join(KINDS)}")
        is_short = self.float16 or self.int8 is not None
        if is_short and "onnx" not in TARGETS[self.target].file:
            raise ValueError(f"float16 and int8 are made for onnx and transformers.js, not for {self.target}")
        if is_short and self.with_processing:
            raise ValueError("float16 and int8 are made of the network alone: leave the processing out of the graph")
        if self.target == "transformers.js" and self.with_processing:
            raise ValueError("transformers.js does the processing itself: leave it out of the graph")
        if len(self.labelled) and self.with_processing:
            raise ValueError("mean IoU is measured on logits: leave the processing out of the graph")
        if self.int8 == "static" and not self.calibration:
            raise ValueError("static int8 needs pictures to calibrate on; dynamic int8 does not")
        if self.int8 != "static" and self.calibration:
            raise ValueError("pictures to calibrate on are for static int8 only")


def export_model(
    model: SegFormerForSemanticSegmentation,
    processor: SegFormerImageProcessor,
    folder: str | Path,
    request: ExportConfig,
) -> dict[str, Any]:
    """Write a model for another runtime, run it there, and compare.

    Beside the file lie export.json, which holds what is returned, and the configurations of model and processor. An
    example is in docs/using.md, which the tests run: tracing a network takes seconds.

    Args:
        model: is left as it is.
        processor: its image processor.
        folder: an empty one; the caller decides what becomes of it after an error.
        request: what is wanted.

    Returns:
        How the graph is called and, by file, how near its answers are to PyTorch's.

    Raises:
        ValueError: if something is in the folder, a package is missing, the model can not be exported, or its answers
            elsewhere are others.
        OSError: if a picture can not be read or a file not be written.
    """
    began, folder, target = time.perf_counter(), Path(folder), TARGETS[request.target]
    if any(folder.iterdir()):
        raise ValueError(f"{folder} must be an empty folder, but it has files in it, which would be overwritten")
    require(*target.packages)
    if request.target == "transformers.js" and model.config.num_labels == 1:
        raise ValueError("the model has one label, and transformers.js takes the best of several: train it with two")
    deployed = DeployedSegFormer(model)
    network = PicturesToLabels(deployed, processor) if request.with_processing else deployed
    reference = ReferenceOutputs(deepcopy(model).float().cpu().eval(), processor, network)
    path = folder / target.file
    path.parent.mkdir(exist_ok=True)
    program = trace(network)
    target.write(program, path)
    figures = {path.name: _checked(path, target, reference, request)}
    if request.float16:
        to_float16(path, path.with_name(_FLOAT16))
        figures[_FLOAT16] = _compared(path.with_name(_FLOAT16), target, reference, request)
        figures[_FLOAT16]["half_arithmetic"] = in_half(deployed, reference, request)
    if request.int8:
        opened_ones = (opened(each, model.config.num_channels) for each in request.calibration)
        inputs = (processor(each, return_tensors="pt").pixel_values for each in opened_ones)
        to_int8(path, path.with_name(_INT8), inputs if request.int8 == "static" else None)
        figures[_INT8] = {"kind": request.int8, **_compared(path.with_name(_INT8), target, reference, request)}
    if len(request.labelled):
        add_mean_iou(figures, path.parent, target, reference, request)
    _write_configurations(model, processor, folder, request.target)
    report = _describe(network, processor, request, target)
    if request.target == "transformers.js":
        files = [_FLOAT16] * request.float16 + [_INT8] * bool(request.int8)
        report["node"] = check_in_node(folder, reference.model, processor, [path.name, *files])
    report |= {"files": figures, "seconds": round(time.perf_counter() - began, 1)}
    write_json(report, folder / "export.json")
    return report


def _is_labelling(program: ExportedProgram) -> bool:
    return program.graph_signature.user_inputs == ("pictures",)


def _compared(path: Path, target: Target, reference: ReferenceOutputs, request: ExportConfig) -> dict[str, Any]:
    """How near a file's answers are to PyTorch's."""
    runtime = target.run(path)
    agreements = [reference.agreement(runtime, *case) for case in reference.cases(request.pictures)]
    size = sum(each.stat().st_size for each in path.parent.glob(f"{path.stem}.*"))
    figures = {"runtime": target.runtime, "bytes": size, **summarise(agreements)}
    if not figures["relative_error"] < float("inf"):
        raise ValueError(f"{path.name} in {target.runtime} gives other shapes, or numbers that are not finite")
    return figures


def _checked(path: Path, target: Target, reference: ReferenceOutputs, request: ExportConfig) -> dict[str, Any]:
    """`_compared` of a file in float32, which must agree."""
    figures = _compared(path, target, reference, request)
    tolerance = RESIZE_TOLERANCE if reference.resizes else TOLERANCE
    if not figures["relative_error"] <= tolerance:
        raise ValueError(
            f"{path.name} in {target.runtime} lies {figures['relative_error']:.1e} of the largest logit off PyTorch's "
            f"answers, but {tolerance:.0e} is allowed"
        )
    return {**figures, "tolerance": tolerance}


def in_half(deployed: nn.Module, reference: ReferenceOutputs, request: ExportConfig) -> dict[str, Any]:
    """What arithmetic in float16 throughout makes of it: ONNX Runtime on a CPU computes much in float32."""
    half = deepcopy(deployed).half()
    with torch.no_grad():
        agreements = [
            reference.agreement(lambda inputs: half(inputs).float(), *case)
            for case in reference.cases(request.pictures)
        ]
    figures = summarise(agreements)
    if not figures["relative_error"] < float("inf"):
        raise ValueError("in float16 the network overflows: its logits are not finite; export it in float32")
    return {name: figures[name] for name in ("max_error", "relative_error", "equal_labels")}


def add_mean_iou(
    figures: dict[str, dict[str, Any]], folder: Path, target: Target, reference: ReferenceOutputs, request: ExportConfig
) -> None:
    """Mean IoU on the labelled pictures, of each file and of PyTorch's own."""
    model, processor = reference.model, reference.processor

    def judged(model: nn.Module) -> Evaluation:
        return evaluate(model, processor, request.labelled, progress=False)

    evaluation = judged(model)
    if not evaluation.matrix.any():
        raise ValueError("no pixel of the label maps counts, so that there is no mean IoU to compare")
    if evaluation.misses_its_class():
        raise ValueError(
            f"no pixel of the label maps is of {evaluation.names[1]!r}: where 255 stands for it, give "
            "--label-values 0 255"
        )
    expected = evaluation.metrics["mean_iou"]
    for name, each in figures.items():
        found = judged(RuntimeModel(target.run(folder / name), model.config)).metrics["mean_iou"]
        each |= {"mean_iou": found, "mean_iou_in_pytorch": expected, "labelled_pictures": len(request.labelled)}


def _write_configurations(
    model: SegFormerForSemanticSegmentation, processor: SegFormerImageProcessor, folder: Path, target: str
) -> None:
    """Names of the classes and the processor's keywords, as this package or transformers.js reads them."""
    if target == "transformers.js":
        transformers_config(model, "SegformerForSemanticSegmentation").to_json_file(folder / "config.json")
        write_json(transformers_processor(processor), folder / "preprocessor_config.json")
    else:
        model.config.to_json_file(folder / "config.json")
        processor.to_json_file(folder / "preprocessor_config.json")


def _describe(
    network: DeployedSegFormer | PicturesToLabels,
    processor: SegFormerImageProcessor,
    request: ExportConfig,
    target: Target,
) -> dict[str, Any]:
    """How the graph is called, and what wrote it."""
    if isinstance(network, PicturesToLabels):
        dtype = "uint8" if network.takes_bytes else "float32"
        called = {
            "input": f"pictures, {dtype} (batch, height, width, {network.num_channels})",
            "output": "labels, int32 (batch, height, width)",
            "resize": f"inside, to {'x'.join(map(str, network.size))}"
            if network.size
            else outside(processor) or "none",
        }
    else:
        channels = network.encoder.config.num_channels
        called = {
            "input": f"pixel_values, float32 (batch, {channels}, height, width)",
            "output": f"logits, float32 (batch, {network.classifier.out_channels}, height / 4, width / 4), rounded up",
        }
    # By the modules: the package that brings one may have another name, such as onnxruntime-gpu.
    versions = {name: import_module(name).__version__ for name in ("torch", *target.packages)}
    return {
        "target": request.target,
        **called,
        "sides": f"{MIN_SIDE} pixels and up",
        "versions": {"hf_segformer": __version__, **versions},
    }


def format_report(report: Mapping[str, Any]) -> str:
    """What `export_model` returned, for a terminal."""
    lines = [f"takes {report['input']}", f"gives {report['output']}"]
    if "resize" in report:
        lines.append(f"resizing: {report['resize']}")
    for name, each in report["files"].items():
        lines.append(
            f"{name} in {each['runtime']}: {each['equal_labels']:.3%} of the labels are PyTorch's, largest error "
            f"{each['relative_error']:.1e} of the largest logit, {each['bytes'] / 1e6:,.1f} MB"
        )
        if "mean_iou" in each:
            lines[-1] += f", mean IoU {each['mean_iou']:.2%} (PyTorch {each['mean_iou_in_pytorch']:.2%})"
        if each["equal_labels"] < NEAR:
            lines.append(
                f"warning: {name} gives other labels than PyTorch at {1 - each['equal_labels']:.1%} of the pixels"
            )
    node = report.get("node", {})
    if "not_run" in node:
        lines.append(f"not run in Node: {node['not_run']}")
    for name, each in node.get("files", {}).items():
        lines.append(
            f"{name} in transformers.js {node['version']}: {each['equal_labels']:.3%} of the labels are PyTorch's"
        )
    return "\n".join(lines)


__all__ = ["TARGETS", "ExportConfig", "export_model", "format_report"]
