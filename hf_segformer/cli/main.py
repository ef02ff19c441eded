"""The command `segformer`: a thin layer over the package's functions.

A command is a function that adds its parser and names the function to run; `COMMANDS` lists them. Each imports what it
needs when it runs, so that `segformer --help` costs nothing.
"""

import argparse
import os
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from ..version import __version__
from .images import add_evaluate, add_predict


def add_convert(commands) -> None:
    """`segformer convert SOURCE DESTINATION`: other code bases' weights to this package's, or back to Transformers'."""
    parser = commands.add_parser(
        "convert",
        help="bring weights of other code bases here, or take them to Transformers' own SegFormer",
        description="Reads the paper's .pth files, mmsegmentation's encoders, segmentation_models_pytorch, "
        "Transformers' own SegFormer and this package's checkpoints, and writes a folder for from_pretrained.",
    )
    parser.add_argument("source", help="a file, a folder or a Hub repository")
    parser.add_argument("destination", type=Path, help="a folder that does not exist yet, or is empty")
    parser.add_argument("--num-channels", type=int, metavar="N", help="take N bands; keeps what the filters learnt")
    parser.add_argument("--encoder-only", action="store_true", help="leave the head out, whatever it is")
    parser.add_argument("--to", choices=["transformers"], help="write for Transformers' own SegFormer, without code")
    parser.set_defaults(run=convert)


def convert(arguments: argparse.Namespace) -> None:
    """Run `segformer convert`."""
    from ..conversion.checkpoints import locate
    from ..conversion.convert import convert_checkpoint, image_processor_for, to_transformers

    require_free(arguments.destination)
    source = locate(arguments.source)
    model = convert_checkpoint(source, num_channels=arguments.num_channels, encoder_only=arguments.encoder_only)
    processor = image_processor_for(source, model.config.num_channels)
    with atomic_directory(arguments.destination) as folder:
        if arguments.to == "transformers":
            difference = to_transformers(model, folder, processor)
        else:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
    config, name = model.config, type(model).__name__
    labels = "no head" if name == "SegFormerModel" else f"{config.num_labels} labels"
    print(
        f"{name}: depths {list(config.depths)}, hidden sizes {list(config.hidden_sizes)}, "
        f"{config.num_channels} channels, {labels}"
    )
    if arguments.to == "transformers":
        print(
            f"loaded in Transformers its output differs by at most {difference:.1e} of the largest value "
            f"(LayerNorm epsilon there 1e-05, here {config.layer_norm_eps:.0e})"
        )
    print(f"written to {arguments.destination}")


def add_info(commands) -> None:
    """`segformer info SOURCE`: what a model costs, stage by stage."""
    parser = commands.add_parser(
        "info",
        help="show grids, tokens, parameters and multiply-adds, stage by stage",
        description="Shows what each stage makes of an image and what it costs, without running the model.",
    )
    parser.add_argument("source", help="b0 to b5, a config.json, a checkpoint or a Hub repository")
    parser.add_argument("--size", default="512x512", metavar="HxW", help="image size in pixels (default: 512x512)")
    parser.add_argument("--num-labels", type=int, metavar="K", help="with another number of labels")
    parser.set_defaults(run=info)


def info(arguments: argparse.Namespace) -> None:
    """Run `segformer info`."""
    from ..benchmarking.cost import format_info, load_config, parse_size

    size = parse_size(arguments.size)
    config = load_config(arguments.source)
    if arguments.num_labels is not None:
        config.num_labels = arguments.num_labels
        config.check()
    print(format_info(config, *size))


def add_bench(commands) -> None:
    """`segformer bench SOURCE`: how fast a model is on this machine, here and in Transformers."""
    parser = commands.add_parser(
        "bench",
        help="measure time and memory on this machine, against Transformers' own SegFormer",
        description="Measures latency, throughput and peak memory of a model with random weights, here and in "
        "Transformers, eager and compiled. The candidates take turns, and must agree before they are timed.",
    )
    parser.add_argument("source", help="b0 to b5, a config.json, a checkpoint or a Hub repository")
    parser.add_argument("--size", action="append", metavar="HxW", help="may be given often (default: 512x512)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at once (default: 1)")
    parser.add_argument("--num-labels", type=int, metavar="K", help="with another number of labels")
    parser.add_argument("--train", action="store_true", help="a training step instead, forward and backward, eager")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--threads", type=int, metavar="N", help="default: as many as PyTorch takes")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds to take medians of (default: 7)")
    parser.add_argument("--device", default="cpu", help="of PyTorch, such as cuda (default: cpu)")
    parser.set_defaults(run=bench)


def bench(arguments: argparse.Namespace) -> None:
    """Run `segformer bench`."""
    from ..benchmarking.cost import load_config, parse_size

    sizes = [parse_size(size) for size in arguments.size or ["512x512"]]
    if small := [size for size in sizes if min(size) < 32]:
        height, width = small[0]
        raise ValueError(f"--size is {height}x{width}, but Transformers' SegFormer needs sides of 32 pixels at least")
    for option in ("batch", "threads", "repeats"):
        if (number := getattr(arguments, option)) is not None and number < 1:
            raise ValueError(f"--{option} is {number}, but it must be 1 at least")
    config = load_config(arguments.source)
    if arguments.num_labels is not None:
        config.num_labels = arguments.num_labels
        config.check()
    from ..benchmarking.comparison import CANDIDATES, EAGER, Task, check_machine, format_measurements, measure

    check_machine(arguments.device, arguments.threads)
    names = EAGER if arguments.no_compile or arguments.train else CANDIDATES
    tasks = [Task(config, arguments.batch, *size, arguments.train, device=arguments.device) for size in sizes]
    print(format_measurements([(task, measure(task, names, rounds=arguments.repeats)) for task in tasks]))


def add_export(commands) -> None:
    """`segformer export SOURCE DESTINATION --to TARGET`: the same answers in another runtime."""
    parser = commands.add_parser(
        "export",
        help="write a model for ONNX Runtime, OpenVINO, torch.export or transformers.js, and compare",
        description="Writes a folder with the network, its head folded, for any number of pictures of any size; runs "
        "it in its own runtime; and compares with PyTorch. What was found is written beside it, to export.json.",
    )
    parser.add_argument("source", help="a file, a folder or a Hub repository")
    parser.add_argument("destination", type=Path, help="a folder that does not exist yet, or is empty")
    parser.add_argument("--to", required=True, choices=["onnx", "openvino", "torch", "transformers.js"])
    parser.add_argument("--with-processing", action="store_true", help="pictures in, label maps of their size out")
    parser.add_argument("--fp16", action="store_true", help="an ONNX file in float16, too")
    parser.add_argument("--int8", choices=["dynamic", "static"], help="an ONNX file in eight bits, too")
    parser.add_argument("--calibrate", type=Path, metavar="DIR", help="pictures that static int8 takes its ranges from")
    parser.add_argument("--images", type=Path, metavar="DIR", help="compare on these pictures, too")
    parser.add_argument("--labels", type=Path, metavar="DIR", help="their label maps, of the same names: mean IoU")
    parser.add_argument(
        "--label-values", type=int, nargs="+", default=[], metavar="N", help="what maps hold for each class, 0 255 say"
    )
    parser.set_defaults(run=export)


def export(arguments: argparse.Namespace) -> None:
    """Run `segformer export`."""
    from ..conversion.convert import load_segmentation
    from ..data.pairing import decode_dataset, find_images, pair_images_and_masks
    from ..export.exporters import ExportConfig, export_model, format_report

    require_free(arguments.destination)
    if arguments.label_values and not arguments.labels:
        raise ValueError("--label-values says what label maps hold: --labels DIR")
    if arguments.labels and not arguments.images:
        raise ValueError("--labels needs the pictures that they belong to: --images DIR")
    request = ExportConfig(
        arguments.to,
        with_processing=arguments.with_processing,
        float16=arguments.fp16,
        int8=arguments.int8,
        calibration=find_images(arguments.calibrate) if arguments.calibrate else (),
        pictures=find_images(arguments.images) if arguments.images else (),
        labelled=pair_images_and_masks(arguments.images, arguments.labels) if arguments.labels else (),
    )
    model, processor = load_segmentation(arguments.source)
    if arguments.labels:
        config = model.config
        rows = decode_dataset(
            request.labelled,
            config.num_channels,
            config.num_labels,
            reduce_labels=processor.do_reduce_labels,
            label_values=arguments.label_values,
        )
        request = replace(request, labelled=rows)
    with atomic_directory(arguments.destination) as folder:
        report = export_model(model, processor, folder, request)
    print(format_report(report))
    print(f"written to {arguments.destination}")


def add_app(commands) -> None:
    """`segformer app MODEL`: a page to try a model on."""
    parser = commands.add_parser(
        "app",
        help="serve a page to try a model on",
        description="Serves a page on this machine: drop a picture, see its classes, take the label map away. "
        "Nothing leaves the machine. Ctrl-C ends it.",
    )
    parser.add_argument("model", help="a folder, a file of weights or a Hub repository")
    parser.add_argument("--port", type=int, metavar="N", help="default: the first free one from 7860 on")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="H", help="0.0.0.0 serves the whole network (default: this machine)"
    )
    parser.add_argument("--device", metavar="D", help="of PyTorch, such as cpu (default: the accelerator, if any)")
    parser.set_defaults(run=app)


def app(arguments: argparse.Namespace) -> None:
    """Run `segformer app`."""
    if arguments.port is not None and not 0 < arguments.port < 65536:
        raise ValueError(f"--port is {arguments.port}, but it must be 1 to 65535")
    from ..app.server import serve

    serve(arguments.model, host=arguments.host, port=arguments.port, device=arguments.device)


def add_push(commands) -> None:
    """`segformer push FOLDER REPO`: publish a trained model on the Hugging Face Hub."""
    parser = commands.add_parser(
        "push",
        help="publish a folder on the Hugging Face Hub",
        description="Publishes model, processor, code, card, pictures and measurements by one commit, or nothing.",
    )
    parser.add_argument("folder", type=Path, help="a folder with a model and its processor")
    parser.add_argument("repository", help="owner/name; it is made if there is none")
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    parser.add_argument("--revision", metavar="BRANCH", help="publish on this branch (default: main)")
    parser.add_argument("--app", action="store_true", help="publish the model's page, too, as a Space of that name")
    parser.set_defaults(run=push)


def push(arguments: argparse.Namespace) -> None:
    """Run `segformer push`."""
    options = {"private": arguments.private, "revision": arguments.revision}
    page, needs_token = None, False
    if arguments.app:
        from ..hub.space import push_folder_with_app

        commit, page, needs_token = push_folder_with_app(arguments.folder, arguments.repository, **options)
    else:
        from ..hub.push import push_folder

        commit = push_folder(arguments.folder, arguments.repository, **options)
    pinned = f'"{commit.repo_url.repo_id}", revision="{commit.oid}"'
    print(f"published as {commit.commit_url}")
    print("load exactly this, whatever is published later:")
    print(f"  SegFormerForSemanticSegmentation.from_pretrained({pinned})")
    print("or without the package installed:")
    print(f"  AutoModelForSemanticSegmentation.from_pretrained({pinned},")
    print(f'      code_revision="{commit.oid}", trust_remote_code=True)')
    if page is not None:
        print(f"its page is {page.repo_url}")
        if needs_token:
            print("  for which the Space needs a secret HF_TOKEN (in its settings) that may read the model")


_DEBUG_HELP = "show where an error comes from"
COMMANDS = (add_convert, add_info, add_bench, add_predict, add_evaluate, add_export, add_app, add_push)


def require_free(destination: Path) -> None:
    """Raise ValueError where a destination holds something already."""
    if destination.is_dir() and any(destination.iterdir()):
        raise ValueError(f"{destination} is a folder with files in it, but it must be a new or an empty folder")
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination} is a file, but it must be a new or an empty folder")


@contextmanager
def atomic_directory(destination: Path) -> Iterator[Path]:
    """A folder to write into, whose files become the destination's only if all went well; else nothing is left.

    It lies beside the destination, whose name it takes in the end. Within it, where that is there already: what a disk
    is mounted on, or somebody works in, can not be replaced.
    """
    is_there, name = destination.is_dir(), f".{destination.name}.{os.getpid()}.partial"
    partial = destination / name if is_there else destination.with_name(name)
    made = [folder for folder in partial.parents if not folder.exists()]
    partial.mkdir(parents=True)
    try:
        yield partial
        if is_there:
            for path in partial.iterdir():
                path.rename(destination / path.name)
            partial.rmdir()
        else:
            partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # somebody else has put something there meanwhile
                folder.rmdir()
        raise


def build_parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser and the names of its commands."""
    parser = argparse.ArgumentParser(prog="segformer", description="SegFormer from scratch, at home in Transformers.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in COMMANDS:
        add_command(commands)
    for each in (parser, *commands.choices.values()):
        each.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=_DEBUG_HELP)
    parser.set_defaults(debug=False)
    return parser, list(commands.choices)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Errors are one line on stderr; `--debug` shows where they come from.

    Args:
        argv: arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 after an error, 130 when interrupted. Wrong usage exits with 2, as argparse does.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser, names = build_parser()
    command = next((argument for argument in argv if not argument.startswith("-")), None)
    if command is not None and command not in names:
        from ..configuration_segformer import closest

        parser.error(f"unknown command {command!r}: {closest(command, names)}")
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has left; what is still buffered must not be flushed into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("segformer: interrupted", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"segformer: {_in_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _in_one_line(error: Exception) -> str:
    """What an error says; the system's own errors say a number, too, which helps nobody."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
