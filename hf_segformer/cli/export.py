"""`segformer export SOURCE DESTINATION --to TARGET`: a model for another runtime, compared with PyTorch."""

import argparse
from dataclasses import replace
from pathlib import Path

from ..files import atomic_directory, check_new_or_empty
from .labeled import check_mask_kind
from .options import add_label_values, add_mask_colors

TARGETS = ("onnx", "openvino", "torch", "aoti", "executorch", "web", "transformers.js")


def add_export(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "export",
        help="export a model to ONNX, OpenVINO, PyTorch, ExecuTorch, a web page or transformers.js, and verify it",
        description="Writes a folder with the network, its head folded, for any batch and image size; runs it in its "
        "own runtime; and compares with PyTorch. The results are in export.json.",
    )
    parser.add_argument("source", help="a file, a folder, or a Hub repository (owner/name)")
    parser.add_argument("destination", type=Path, help="a new or an empty folder")
    parser.add_argument("--to", required=True, choices=TARGETS, help="the runtime")
    parser.add_argument(
        "--include-processing",
        action="store_true",
        help="put resizing, scaling and argmax into the graph: images in, segmentation maps out",
    )
    parser.add_argument("--fp16", action="store_true", help="also write an ONNX file in float16")
    parser.add_argument("--int8", choices=["dynamic", "static"], help="also write a quantized ONNX file")
    parser.add_argument("--calibration-dir", type=Path, metavar="DIR", help="images that calibrate static int8")
    parser.add_argument("--images", type=Path, metavar="DIR", help="compare on these images too")
    parser.add_argument("--masks", type=Path, metavar="DIR", help="masks of these images: compare mean IoU")
    parser.add_argument(
        "--max-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="largest image for --to executorch"
    )
    parser.add_argument(
        "--onnxruntime-web", type=Path, metavar="DIR", help="folder of the npm package for --to web (node_modules)"
    )
    add_label_values(parser)
    add_mask_colors(parser)
    parser.set_defaults(check=check, run=run)


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError if options do not go together, or the destination is taken."""
    check_new_or_empty(arguments.destination)
    short = [name for name, is_given in (("--fp16", arguments.fp16), ("--int8", arguments.int8)) if is_given]
    if short and arguments.to not in ("onnx", "transformers.js"):
        raise ValueError(f"{short[0]} is given with --to {arguments.to}; expected --to onnx or transformers.js")
    if arguments.include_processing:
        if arguments.fp16:
            raise ValueError(
                "--fp16 is given with --include-processing; expected the network alone: leave out "
                "--include-processing, or export in float32 or int8"
            )
        if arguments.to in ("transformers.js", "web"):
            raise ValueError(
                f"--include-processing is given with --to {arguments.to}, which processes images itself; leave out "
                "--include-processing"
            )
        if arguments.masks:
            raise ValueError(
                "--masks is given with --include-processing; mean IoU is measured on logits: leave out one of them"
            )
    if arguments.masks and arguments.to == "web":
        raise ValueError(
            "--masks is given with --to web, which gives no logits for mean IoU; measure it with --to onnx"
        )
    if arguments.max_size and arguments.to != "executorch":
        raise ValueError(f"--max-size is given with --to {arguments.to}; expected --to executorch")
    if arguments.onnxruntime_web and arguments.to != "web":
        raise ValueError(f"--onnxruntime-web is given with --to {arguments.to}; expected --to web")
    if arguments.int8 == "static" and not arguments.calibration_dir:
        raise ValueError("--int8 is static; expected images to calibrate on: add --calibration-dir DIR, or use dynamic")
    if arguments.calibration_dir and arguments.int8 != "static":
        raise ValueError("--calibration-dir is given; expected with --int8 static, which alone calibrates")
    if arguments.masks and not arguments.images:
        raise ValueError("--masks is given; expected together with --images DIR, the images that they belong to")
    for option in ("label_values", "mask_colors", "ignore_colors"):
        if getattr(arguments, option) and not arguments.masks:
            raise ValueError(f"--{option.replace('_', '-')} is given; expected together with --masks DIR")
    check_mask_kind(arguments.label_values, arguments.mask_colors, arguments.ignore_colors)


def run(arguments: argparse.Namespace) -> None:
    """Export, and print the comparison."""
    from ..conversion.loading import load_segmentation
    from ..data.pairing import decode_dataset, find_images, pair_images_and_masks
    from ..export.exporters import ExportConfig, export_model, format_report

    request = ExportConfig(
        arguments.to,
        include_processing=arguments.include_processing,
        float16=arguments.fp16,
        int8=arguments.int8,
        calibration=find_images(arguments.calibration_dir) if arguments.calibration_dir else (),
        images=find_images(arguments.images) if arguments.images else (),
        dataset=pair_images_and_masks(arguments.images, arguments.masks) if arguments.masks else (),
        max_size=tuple(arguments.max_size) if arguments.max_size else None,
        onnxruntime_web=arguments.onnxruntime_web,
    )
    model, processor = load_segmentation(arguments.source)
    if arguments.masks:
        dataset = decode_dataset(
            request.dataset,
            model.config.num_channels,
            model.config.num_labels,
            reduce_labels=processor.do_reduce_labels,
            label_values=arguments.label_values,
            mask_colors=arguments.mask_colors,
            ignore_colors=arguments.ignore_colors,
            ignore_index=model.config.semantic_loss_ignore_index,
            any_range=processor.value_range is not None,
        )
        request = replace(request, dataset=dataset)
    with atomic_directory(arguments.destination) as folder:
        report = export_model(model, processor, folder, request)
    print(format_report(report))
    print(f"written to {arguments.destination}")


__all__ = ["TARGETS", "add_export"]
