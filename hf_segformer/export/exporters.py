"""Export of a segmentation model to other runtimes: ONNX Runtime, OpenVINO, PyTorch, ExecuTorch, browsers.

A file counts as exported once it was read back by its own runtime and compared with PyTorch, at several sizes and batch
sizes, on random images and on given ones. The figures are written beside it.

Axes: B images, C channels, H W an image's sides, K classes, h w sides of the logits.
"""

import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..evaluation.evaluate import Evaluation, evaluate
from ..files import write_json
from ..image_processing_segformer import SegFormerImageProcessor
from ..modeling_segformer import SegFormerForSemanticSegmentation
from ..version import __version__
from .exportable import (
    MIN_SIDE,
    DeployedSegFormer,
    SegFormerWithProcessing,
    resize_outside,
    target_size,
    trace,
)
from .metadata import describe_model
from .quantization import KINDS, to_float16, to_int8
from .runtimes import RuntimeModel, require
from .targets import TARGETS, Target
from .transformers_js import FLOAT16, INT8, require_several_labels, write_configurations
from .verification import ReferenceOutputs, summarise
from .web import find_onnxruntime_web, require_page, write_page

TOLERANCE = 1e-4  # of the largest logit, in float32
RESIZE_TOLERANCE = 2e-2  # where the graph resizes: PIL rounds some half-way sums to the other grey level
WARN_BELOW = 0.99  # pixel agreement of a shorter type
_SHORT_TARGETS = ("onnx", "transformers.js")


@dataclass(frozen=True, eq=False)
class ExportConfig:
    """Options of an export, and the data to verify it on.

    Args:
        target: one of `TARGETS`.
        include_processing: images in, segmentation maps out: see `SegFormerWithProcessing`.
        float16: write an ONNX file in float16 beside the one in float32.
        int8: "dynamic" or "static" writes an ONNX file in eight bits beside it.
        calibration: images from which static int8 learns the ranges of activations; paths, or whatever the image
            processor takes.
        images: images to compare on, in addition to random ones; paths, or whatever the image processor takes.
        dataset: rows with `image` and `label`, as `evaluation.evaluate` takes them, to measure mean IoU on, in PyTorch
            and in each file.
        max_size: largest (height, width) of an image, for the target executorch, which plans its memory for it; by
            default the processor's, if that resizes to one size.
        onnxruntime_web: folder of the npm package, for the target web; by default it is looked for in node_modules.

    Raises:
        ValueError: if the target is unknown, or cannot be combined with an option.
    """

    target: str
    include_processing: bool = False
    float16: bool = False
    int8: str | None = None
    calibration: Sequence[Any] = ()
    images: Sequence[Any] = ()
    dataset: Any = ()
    max_size: tuple[int, int] | None = None
    onnxruntime_web: Path | None = None

    @property
    def has_processing(self) -> bool:
        """Return True if the graph contains the image processing: on request, and always for a page."""
        return self.include_processing or self.target == "web"

    def __post_init__(self):
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}; expected one of {', '.join(TARGETS)}")
        if self.int8 is not None and self.int8 not in KINDS:
            raise ValueError(f"int8 is {self.int8!r}; expected one of {', '.join(KINDS)}")
        is_short = self.float16 or self.int8 is not None
        if is_short and self.target not in _SHORT_TARGETS:
            raise ValueError(
                f"target is {self.target}; expected onnx or transformers.js (--to) for float16 (--fp16) and int8 "
                "(--int8)"
            )
        if self.onnxruntime_web and self.target != "web":
            raise ValueError(f"onnxruntime_web (--onnxruntime-web) is given for {self.target}; expected web (--to web)")
        if self.max_size is not None:
            if self.target != "executorch":
                raise ValueError(f"max_size (--max-size) is given for {self.target}; expected executorch")
            if min(self.max_size) < MIN_SIDE:
                raise ValueError(f"max_size is {self.max_size}; expected sides of {MIN_SIDE} or more (--max-size)")
        if self.has_processing:
            self._check_processing()
        if self.int8 == "static" and not self.calibration:
            raise ValueError(
                "int8 is static; expected images to calibrate on (--calibration-dir DIR), or dynamic (--int8 dynamic)"
            )
        if self.int8 != "static" and self.calibration:
            raise ValueError(
                f"int8 is {self.int8}; expected static (--int8 static) where images to calibrate on are given "
                "(--calibration-dir)"
            )

    def _check_processing(self) -> None:
        without = "include_processing is set (--include-processing); leave it out"
        if self.float16:
            raise ValueError(f"{without} for float16 (--fp16), which converts the network alone")
        if self.include_processing and self.target in ("transformers.js", "web"):
            raise ValueError(f"{without} for {self.target}, which does the processing itself")
        if len(self.dataset) and self.target == "web":
            raise ValueError("mean IoU (--masks) needs logits, and web (--to web) has none; measure it with onnx")
        if len(self.dataset):
            raise ValueError(f"{without} to measure mean IoU (--masks), which needs logits")


def export_model(
    model: SegFormerForSemanticSegmentation,
    processor: SegFormerImageProcessor,
    folder: str | Path,
    config: ExportConfig,
) -> dict[str, Any]:
    """Write a model for another runtime, run it there, and compare it with PyTorch.

    The folder also gets export.json, which holds what is returned, and the configurations of model and processor. An
    example is in docs/guides/export.md, which the tests run: tracing a network takes seconds.

    Args:
        model: not modified.
        processor: its image processor.
        folder: an empty folder; the caller removes it after an error.
        config: options.

    Returns:
        The graph's inputs and outputs, whether it resizes, and by file, the parity with PyTorch.

    Raises:
        ValueError: if the folder is not empty, a package is missing, the model cannot be exported, or its outputs
            differ from PyTorch's.
        OSError: if an image cannot be read or a file cannot be written.
    """
    began, folder, target = time.perf_counter(), Path(folder), TARGETS[config.target]
    if any(folder.iterdir()):
        raise ValueError(f"{folder} holds files, which would be overwritten; expected an empty folder")
    if target.check is not None:
        target.check()
    require(*target.packages)
    if config.target == "transformers.js":
        require_several_labels(model)
    library = None
    if config.target == "web":
        require_page(model, processor)
        library = find_onnxruntime_web(config.onnxruntime_web)
    deployed = DeployedSegFormer(model)
    network = SegFormerWithProcessing(deployed, processor) if config.has_processing else deployed
    max_size = config.max_size or (one_size(processor) if config.target == "executorch" else None)
    reference = ReferenceOutputs(deepcopy(model).float().cpu().eval(), processor, network, max_size)
    path = folder / target.file
    path.parent.mkdir(exist_ok=True)
    metadata = describe_model(model, processor, config.has_processing)
    target.write(trace(network, max_size), path, metadata)
    figures = {path.name: _verified(path, target, reference, config)}
    _write_short_types(path, figures, deployed, reference, config)
    if len(config.dataset):
        add_mean_iou(figures, path.parent, target, reference, config)
    report = _describe(network, processor, config, target, max_size)
    if library is not None:
        report["versions"] |= write_page(processor, metadata, library, folder)
    elif config.target == "transformers.js":
        write_configurations(model, processor, folder)
    else:
        model.config.to_json_file(folder / "config.json")
        processor.to_json_file(folder / "preprocessor_config.json")
    report |= {"files": figures, "seconds": round(time.perf_counter() - began, 1)}
    write_json(report, folder / "export.json")
    return report


def one_size(processor: SegFormerImageProcessor) -> tuple[int, int]:
    """Return the size (height, width) to which a processor resizes all images, at least `MIN_SIDE`, or raise."""
    if not processor.do_resize or processor.keep_ratio or "height" not in processor.size:
        raise ValueError(
            "the image processor gives images of many sizes, and executorch plans its memory for the largest: give "
            "max_size (--max-size HEIGHT WIDTH)"
        )
    height, width = target_size(processor)
    return max(height, MIN_SIDE), max(width, MIN_SIDE)


def _write_short_types(
    path: Path,
    figures: dict[str, dict[str, Any]],
    deployed: DeployedSegFormer,
    reference: ReferenceOutputs,
    config: ExportConfig,
) -> None:
    """Convert the float32 file to the shorter types that are asked for, and compare them."""
    target = TARGETS[config.target]
    if config.float16:
        to_float16(path, path.with_name(FLOAT16))
        figures[FLOAT16] = _compared(path.with_name(FLOAT16), target, reference, config)
        figures[FLOAT16]["half_arithmetic"] = in_half(deployed, reference, config)
    if config.int8:
        inputs = (reference.inputs(reference.read(each)) for each in config.calibration)
        to_int8(path, path.with_name(INT8), inputs if config.int8 == "static" else None)
        figures[INT8] = {"kind": config.int8, **_compared(path.with_name(INT8), target, reference, config)}


def _compared(path: Path, target: Target, reference: ReferenceOutputs, config: ExportConfig) -> dict[str, Any]:
    """Compare a file's outputs with PyTorch's."""
    runtime = target.run(path)
    reports = [reference.compare(runtime, *case) for case in reference.cases(config.images)]
    size = sum(each.stat().st_size for each in path.parent.glob(f"{path.stem}.*"))
    figures = {"runtime": target.runtime, "bytes": size, **summarise(reports)}
    if not figures["relative_error"] < float("inf"):
        raise ValueError(f"{path.name} in {target.runtime} gives other shapes, or numbers that are not finite")
    return figures


def _verified(path: Path, target: Target, reference: ReferenceOutputs, config: ExportConfig) -> dict[str, Any]:
    """Compare a file in float32, and raise ValueError beyond the tolerance."""
    figures = _compared(path, target, reference, config)
    tolerance = RESIZE_TOLERANCE if reference.resizes else TOLERANCE
    if not figures["relative_error"] <= tolerance:
        raise ValueError(
            f"{path.name} in {target.runtime} differs from PyTorch by {figures['relative_error']:.1e} of the largest "
            f"logit; expected at most {tolerance:.0e}"
        )
    return {**figures, "tolerance": tolerance}


def in_half(deployed: nn.Module, reference: ReferenceOutputs, config: ExportConfig) -> dict[str, Any]:
    """Compare arithmetic in float16 throughout, as on a GPU: ONNX Runtime on a CPU computes much in float32."""
    half = deepcopy(deployed).half()
    with torch.no_grad():
        reports = [
            reference.compare(lambda inputs: half(inputs).float(), *case) for case in reference.cases(config.images)
        ]
    figures = summarise(reports)
    if not figures["relative_error"] < float("inf"):
        raise ValueError("the logits are not finite in float16: the network overflows; export it in float32")
    return {name: figures[name] for name in ("max_error", "relative_error", "pixel_agreement")}


def add_mean_iou(
    figures: dict[str, dict[str, Any]], folder: Path, target: Target, reference: ReferenceOutputs, config: ExportConfig
) -> None:
    """Add mean IoU on the annotated images, of each file and of PyTorch, to the figures."""
    model, processor = reference.model, reference.processor

    def evaluated(model: nn.Module) -> Evaluation:
        return evaluate(model, processor, config.dataset, progress=False)

    evaluation = evaluated(model)
    if not evaluation.matrix.any():
        raise ValueError("every pixel of the masks is ignored; expected at least one valid pixel for mean IoU")
    if evaluation.misses_its_class():
        raise ValueError(
            f"no pixel of the masks is {evaluation.names[1]!r}: if 255 stands for it, give --label-values 0 255"
        )
    expected = evaluation.metrics["mean_iou"]
    for name, each in figures.items():
        found = evaluated(RuntimeModel(target.run(folder / name), model.config)).metrics["mean_iou"]
        each |= {"mean_iou": found, "mean_iou_in_pytorch": expected, "num_images": len(config.dataset)}


def _describe(
    network: DeployedSegFormer | SegFormerWithProcessing,
    processor: SegFormerImageProcessor,
    config: ExportConfig,
    target: Target,
    max_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Describe the graph's inputs and outputs, whether it resizes, and the versions that wrote it."""
    if isinstance(network, SegFormerWithProcessing):
        dtype = "uint8" if network.takes_bytes else "float32"
        interface = {
            "input": f"images, {dtype} (batch, height, width, {network.num_channels})",
            "output": "segmentation, int32 (batch, height, width)",
            "resize": _describe_resize(network, processor, config.target),
        }
    else:
        channels = network.encoder.config.num_channels
        interface = {
            "input": f"pixel_values, float32 (batch, {channels}, height, width)",
            "output": f"logits, float32 (batch, {network.classifier.out_channels}, height / 4, width / 4), rounded up",
            "resize": "not in the graph: the image processor of preprocessor_config.json resizes before it",
        }
    # By the modules: the package that brings one may have another name, such as onnxruntime-gpu.
    modules = ("torch", *target.packages)
    versions = {name.removesuffix(".version"): import_module(name).__version__ for name in modules}
    return {
        "target": config.target,
        **interface,
        "sides": _describe_sides(max_size),
        "versions": {"hf_segformer": __version__, **versions},
    }


def _describe_sides(max_size: tuple[int, int] | None) -> str:
    if max_size is None:
        return f"{MIN_SIDE} pixels and up"
    return f"{MIN_SIDE} pixels to {'x'.join(map(str, max_size))} (height x width), one image at a time"


def _describe_resize(network: SegFormerWithProcessing, processor: SegFormerImageProcessor, target: str) -> str:
    if network.size:
        return f"in the graph, to {'x'.join(map(str, network.size))} (height x width)"
    reason = resize_outside(processor)
    if not reason:
        return "none: images keep their size"
    before = "the page resizes before it, by the browser's filter" if target == "web" else "resize images before it"
    return f"not in the graph: {reason}; {before}"


def format_report(report: Mapping[str, Any]) -> str:
    """Format the result of `export_model` for a terminal."""
    lines = [
        f"input: {report['input']}",
        f"output: {report['output']}",
        f"resizing: {report['resize']}",
        f"sides: {report['sides']}",
    ]
    for name, each in report["files"].items():
        lines.append(
            f"{name} in {each['runtime']}: {each['pixel_agreement']:.3%} of the pixels as in PyTorch, largest error "
            f"{each['relative_error']:.1e} of the largest logit, {each['bytes'] / 1e6:,.1f} MB"
        )
        if "mean_iou" in each:
            lines[-1] += f", mean IoU {each['mean_iou']:.2%} (PyTorch {each['mean_iou_in_pytorch']:.2%})"
        if each["pixel_agreement"] < WARN_BELOW:
            lines.append(
                f"warning: {name} predicts other classes than PyTorch for {1 - each['pixel_agreement']:.1%} of the "
                "pixels"
            )
    return "\n".join(lines)


__all__ = ["ExportConfig", "export_model", "format_report"]
