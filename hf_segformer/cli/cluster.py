"""Options of `segformer predict` on what computes: an engine of this process or a Ray cluster, which reads storage."""

import argparse
import os
import re
from importlib.util import find_spec
from typing import Any

from ..cluster.options import INSTALL, ClusterOptions, check_address, is_address, shown_address
from ..config import InferenceOptions
from .options import whole_number

_OPTIONS = {  # of the command, by the fields of `ClusterOptions`
    "actors": "--actors",
    "gpus_per_actor": "--gpus-per-actor",
    "cpus_per_actor": "--cpus-per-actor",
    "retries": "--retries",
    "address": "--ray-address",
}
_RUNTIMES = ("onnxruntime", "openvino")  # which compute on the CPU
# What a cluster does not predict, read or write.
_WITHOUT_EFFECT: tuple[str, ...] = ("dataset", "stream", "overlay", "probabilities", "keep_identity", "device")
_WITHOUT_EFFECT += ("tile_size", "tile_overlap", "confidence", "polygons", "aoi", "mosaic")
_WITHOUT_EFFECT += ("frame_masks", "smoothing", "overlay_as", "plot_shares")


def actor_numbers(text: str) -> tuple[int, int]:
    """Argument type: `MIN:MAX`, or one number for both."""
    numbers = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", text)
    if numbers is None:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected MIN:MAX, such as 1:8, or one number")
    return int(numbers[1]), int(numbers[2] or numbers[1])


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group, default = parser.add_argument_group("cluster"), ClusterOptions()
    group.add_argument(
        "--engine",
        choices=["torch", "compiled", *_RUNTIMES, "ray"],
        default="torch",
        help="compute the network by PyTorch, compiled, in ONNX Runtime or in OpenVINO, in this process or those of "
        "torchrun; or predict by the actors of a Ray cluster, as Parquet, from folders or from object storage "
        "(s3://..., gs://...) (default: torch)",
    )
    group.add_argument(
        "--actors",
        type=actor_numbers,
        metavar="MIN:MAX",
        help="least and most actors; the number follows the work (default: from 1 on, as many as there is room for)",
    )
    group.add_argument(
        "--gpus-per-actor", type=float, metavar="N", help="0.5 lets two actors share a GPU (default: 0, which is CPUs)"
    )
    group.add_argument(
        "--cpus-per-actor",
        type=whole_number(1),
        metavar="N",
        help=f"CPUs, and threads, of an actor (default: {default.cpus_per_actor})",
    )
    group.add_argument(
        "--retries",
        type=whole_number(0),
        metavar="N",
        help=f"times that a shard is predicted again after its actor died (default: {default.retries})",
    )
    group.add_argument(
        "--ray-address",
        dest="address",
        metavar="HOST:PORT",
        help="of a running cluster, or auto for the one of this machine (default: start one on this machine)",
    )


def check_cluster_options(arguments: argparse.Namespace) -> None:
    """Raise ValueError if options do not go together; choose the format where none is given."""
    given = {name: getattr(arguments, name) for name in _OPTIONS if getattr(arguments, name) is not None}
    addresses = [each for each in arguments.inputs if is_address(each)]
    if arguments.engine != "ray":
        arguments.format = arguments.format or "png"
        if arguments.engine in _RUNTIMES:
            _check_runtime(arguments)
        if given:
            raise ValueError(f"{_OPTIONS[next(iter(given))]} is given without --engine ray, to which it applies")
        if addresses:
            raise ValueError(
                f"{shown_address(addresses[0])} is an address; expected files, folders or patterns, or --engine ray, "
                "which reads object storage"
            )
        return
    if find_spec("ray") is None:
        raise ValueError(f"--engine ray needs Ray Data: {INSTALL}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--engine ray starts its own processes; expected one process, without torchrun")
    _check_effects(arguments)
    _check_addresses(arguments, addresses)
    arguments.format = "parquet"
    try:
        arguments.cluster = ClusterOptions(**given)
    except ValueError as error:
        raise ValueError(re.sub(r"^\w+", lambda name: _OPTIONS[name[0]], str(error))) from error


def _check_runtime(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that a runtime does not follow; without --device it is the CPU."""
    if find_spec(arguments.engine) is None:
        raise ValueError(f"--engine {arguments.engine} needs a package: pip install 'hf-segformer[export]'")
    if arguments.device not in (None, "cpu"):
        raise ValueError(f"--device {arguments.device} is given with --engine {arguments.engine}; expected cpu")
    if arguments.dtype not in (None, "float32"):
        raise ValueError(f"--dtype {arguments.dtype} is given with --engine {arguments.engine}; expected float32")
    arguments.device = "cpu"


def _check_effects(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options without effect on a cluster."""
    if arguments.format == "png":
        raise ValueError("--format png is given with --engine ray, which writes Parquet; leave it out")
    defaults = InferenceOptions()
    for name in _WITHOUT_EFFECT:
        if getattr(arguments, name) not in (None, False, getattr(defaults, name, None)):
            option = "--" + name.replace("_", "-")
            reason = "chooses by --gpus-per-actor" if name == "device" else "has no use for it"
            raise ValueError(f"{option} is given with --engine ray, which {reason}; leave it out")
    if arguments.axis and not arguments.pages:
        raise ValueError("--axis is given with --engine ray, which predicts no volumes; expected --pages, too")


def _check_addresses(arguments: argparse.Namespace, addresses: list[str]) -> None:
    """Raise ValueError for addresses that are not of object storage, or beside what cannot be read there."""
    for address in addresses:
        check_address(address)
    if addresses and len(addresses) < len(arguments.inputs):
        other = next(each for each in arguments.inputs if each not in addresses)
        raise ValueError(f"{shown_address(addresses[0])} is given with {other}; expected addresses alone, or file://")
    if addresses and arguments.pages:
        raise ValueError(
            f"--pages is given with {shown_address(addresses[0])}, whose files are not opened to count them"
        )


def storage_source(arguments: argparse.Namespace, reading: dict[str, Any]) -> Any:
    """Return the source of addresses, or None where the inputs are none."""
    if arguments.engine != "ray" or not any(map(is_address, arguments.inputs)):
        return None
    from ..cluster.storage import StorageSource

    return StorageSource(arguments.inputs, **reading)


def cluster_engine(arguments: argparse.Namespace) -> Any:
    """Return the cluster for `predict_batch`; None predicts in this process."""
    if arguments.engine != "ray":
        return None
    from ..cluster.engine import RayEngine

    return RayEngine(arguments.cluster)


__all__ = ["actor_numbers", "add_cluster_options", "check_cluster_options", "cluster_engine", "storage_source"]
