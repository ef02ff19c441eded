"""`segformer bench SOURCE`: time and memory on this machine, here and in Transformers."""

import argparse

from .options import add_device, image_size, whole_number

_LEAST_SIDE = 32  # below it Transformers' own SegFormer fails


def add_bench(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bench",
        help="measure time and memory on this machine, against Transformers' own SegFormer",
        description="Measures latency, throughput and peak memory of a model with random weights, here and in "
        "Transformers, eager and compiled. Samples of the candidates are interleaved, and their outputs are compared "
        "before they are timed.",
    )
    parser.add_argument("source", help="b0 to b5, a config.json, a checkpoint, or a Hub repository (owner/name)")
    parser.add_argument(
        "--size",
        type=image_size,
        action="append",
        metavar="HxW",
        help="image size in pixels, may be repeated (default: 512x512)",
    )
    parser.add_argument(
        "--batch-size", type=whole_number(1), default=1, metavar="N", help="images per batch (default: 1)"
    )
    parser.add_argument("--num-labels", type=whole_number(1), metavar="K", help="replace the number of labels")
    parser.add_argument(
        "--train", action="store_true", help="measure a training step, forward and backward, eager only"
    )
    parser.add_argument(
        "--explain", action="store_true", help="show which implementation of each operation runs, and why; no timing"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--threads", type=whole_number(1), metavar="N", help="threads of PyTorch (default: its own)")
    parser.add_argument(
        "--repeats", type=whole_number(1), default=7, metavar="N", help="samples per candidate (default: 7)"
    )
    add_device(parser, default="cpu")
    parser.set_defaults(check=check, run=run)


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError if a size is too small."""
    arguments.size = arguments.size or [(512, 512)]
    for height, width in arguments.size:
        if min(height, width) < _LEAST_SIDE:
            raise ValueError(
                f"--size is {height}x{width}; expected sides of at least {_LEAST_SIDE} pixels, which Transformers' "
                "SegFormer needs"
            )


def run(arguments: argparse.Namespace) -> None:
    """Measure, and print the table."""
    from ..benchmarking.cost import load_config
    from ..benchmarking.tasks import (
        CANDIDATES,
        EAGER,
        Task,
        check_machine,
        format_fast_paths,
        format_measurements,
        measure,
    )

    config = load_config(arguments.source, arguments.num_labels)
    check_machine(arguments.device, arguments.threads)
    names = EAGER if arguments.no_compile or arguments.train else CANDIDATES
    tasks = [
        Task(config, arguments.batch_size, height, width, arguments.train, device=arguments.device)
        for height, width in arguments.size
    ]
    if arguments.explain:
        print("\n\n".join(format_fast_paths(task) for task in tasks))
        return
    print(format_measurements([(task, measure(task, names, rounds=arguments.repeats)) for task in tasks]))


__all__ = ["add_bench"]
