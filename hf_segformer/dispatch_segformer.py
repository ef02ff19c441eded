"""When fast paths run, and how they share out work over the cores.

Every fast path has a plain twin, which is the ground truth and runs wherever a fast one could go wrong: while exporting
or tracing, and while compiling but for the encoder at inference; under function transforms and dispatch modes; on
tensors that are more than they seem; and where the user said so by `set_fast_paths(False)` or HF_SEGFORMER_PLAIN=1.

Kernels for the GPU are not shipped with checkpoints. Where the package is installed, and they were switched on, it puts
them into the table here; the table of a copy that came with a checkpoint stays empty.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from threading import Lock, Thread
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

Item = TypeVar("Item")

KERNELS: dict[tuple[str, str], Callable[..., Any]] = {}  # by kind of device and name; hf_segformer.kernels fills it
_MOST_ELEMENTS = 1 << 31  # of a picture: kernels count within one in 32 bits

# Of operations that a compiler calls. Each copy of these files, as checkpoints bring one along, has its own namespace.
OPERATIONS = re.sub(r"\W", "_", __name__)

# glibc hands memory at the end of its heap back to the system once it is more than twice the largest block freed so
# far, 64 MiB at most. Within a network that is every layer, and getting it again takes a sixth of B0's time. A large
# block, freed without having been touched, sets the limit to what it would come to in any case.
torch.empty((1 << 25) - (1 << 16), dtype=torch.uint8, device="cpu")


def set_fast_paths(enabled: bool) -> None:
    """Switch every fast path on or off, for all models in this process and the processes that it starts.

    It sets the environment variable HF_SEGFORMER_PLAIN, which therefore is the same switch.

    Args:
        enabled: False runs the plain version of everything.
    """
    os.environ["HF_SEGFORMER_PLAIN"] = "0" if enabled else "1"


def are_fast_paths_on() -> bool:
    """What `set_fast_paths` or the environment said."""
    return os.environ.get("HF_SEGFORMER_PLAIN", "0") in ("", "0")


def is_fast(*tensors: Tensor) -> bool:
    """Whether fast paths may run on these tensors: switched on, nothing records, all plain float tensors of a CPU."""
    return (
        not torch.compiler.is_compiling()
        and are_fast_paths_on()
        and _is_unobserved()
        and all(
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.device.type == "cpu"
            and tensor.layout is torch.strided
            and tensor.is_floating_point()
            for tensor in tensors
        )
    )


def kernel(name: str, *tensors: Tensor) -> Callable[..., Any] | None:
    """The kernel of that name for these tensors, or None where the plain version has to run.

    Kernels are operations that `torch.compile` knows, with their gradients; an export has to do without.

    Args:
        name: of the operation.
        tensors: all that it would take, on one device.
    """
    found = KERNELS.get((tensors[0].device.type, name)) if KERNELS else None
    return found if found is not None and _may_use_kernels(*tensors) else None


def _may_use_kernels(*tensors: Tensor) -> bool:
    """Whether nothing exports, traces or records these tensors, and they are plain ones of one device."""
    return (
        are_fast_paths_on()
        and not torch.compiler.is_exporting()
        and (torch.compiler.is_compiling() or _is_unobserved())
        and all(
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.device == tensors[0].device
            and tensor.layout is torch.strided
            and tensor.is_floating_point()
            and 0 < tensor.numel() < _MOST_ELEMENTS * len(tensor)
            for tensor in tensors
        )
    )


def _is_unobserved() -> bool:
    """Whether nobody traces, transforms, differentiates forward or counts what is computed."""
    return (
        not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0  # fake tensors, counters of operations
        and forward_ad._current_level < 0
        and not nn.modules.module._has_any_global_hook()
    )


def is_fast_and_full(*tensors: Tensor) -> bool:
    """Whether `is_fast`, and all are of one type of at least 32 bits that nothing casts."""
    return (
        is_fast(*tensors)
        and not torch.is_autocast_enabled("cpu")
        and tensors[0].dtype in (torch.float32, torch.float64)
        and len({tensor.dtype for tensor in tensors}) == 1
    )


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd must be able to go back to one of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def is_compiled_and_full(*tensors: Tensor) -> bool:
    """Whether `torch.compile` traces these tensors for a CPU, as `is_fast_and_full` wants them, and without a gradient.

    What then calls fast code must be an operation of its own, that the compiler does not look into.
    """
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and are_fast_paths_on()
        and not torch.is_autocast_enabled("cpu")
        and not needs_gradient(*tensors)
        and all(
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.device.type == "cpu"
            and tensor.dtype == tensors[0].dtype
            and tensor.dtype in (torch.float32, torch.float64)
            for tensor in tensors
        )
    )


def is_untouched(module: nn.Module) -> bool:
    """Whether calling the module runs its class's `forward` and nothing else: no hook, no offloading."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_exactly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is just what its type says, so that using its weights directly equals calling it.

    LoRA layers and parametrizations change the type, quantisation the type of the weight, hooks and offloading the
    call. Where any of them is at work, only calling the module is right.
    """
    plain = (nn.Parameter, Tensor, FakeTensor)  # the last while exporting
    return type(module) is kind and type(module.weight) in plain and is_untouched(module)


def is_idle(dropout: nn.Module) -> bool:
    """Whether the dropout is the one that was built, and drops nothing."""
    return type(dropout) is nn.Dropout and is_untouched(dropout) and not (dropout.training and dropout.p)


def linear_weights(*linears: nn.Module) -> list[Tensor] | None:
    """Weight and bias of each layer, or None where one is not just a linear layer with a bias."""
    if not all(is_exactly(linear, nn.Linear) and linear.bias is not None for linear in linears):
        return None
    return [tensor for linear in linears for tensor in (linear.weight, linear.bias)]


def parallel_for(work: Callable[[Iterator[Item]], None], items: Sequence[Item]) -> None:
    """Run `work` in as many threads as PyTorch uses, over items that are dealt out one by one.

    Each thread computes on one core, so that what it works on stays in that core's cache, no operation waits for
    another core, and a core that someone else keeps busy merely gets fewer items.

    Args:
        work: called once in every thread with an iterator of the items that fall to it. Gradients are not recorded,
            and there is no autocast.
        items: what there is to do, in any order.
    """
    dealt, errors, inference = iter(items), [], torch.is_inference_mode_enabled()

    def run() -> None:
        torch.set_num_threads(1)  # of this thread, and the default of threads yet to start
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):
            try:
                work(dealt)
            except BaseException as error:
                errors.append(error)
                drain(dealt)

    with _same_threads_after() as num_threads:
        threads: list[Thread] = []
        try:
            for _ in range(min(num_threads, len(items)) - 1):
                threads.append(Thread(target=run))
                threads[-1].start()
            run()
            for thread in threads:
                thread.join()
        finally:  # Ctrl-C may have come while waiting, or no thread have been left to start
            drain(dealt)
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
    if errors:
        raise errors[0]


def drain(dealt: Iterator[Item]) -> None:
    """Take what is left, so that nobody goes on."""
    for _ in dealt:
        pass


@contextmanager
def _same_threads_after() -> Iterator[int]:
    """The number of threads that PyTorch uses, which holds again at the end, in this thread and those yet to start.

    PyTorch has one number for each thread, and another for threads yet to start, which whoever sets the first sets,
    too. So where calls of `share` overlap, one that begins in a new thread would find 1, and leave 1 behind.
    """
    own = torch.get_num_threads()
    with _running.lock:
        if not _running.count:
            _running.default = own
        elif own == 1:
            own = _running.default
        _running.count += 1
    try:
        yield own
    finally:
        torch.set_num_threads(own)
        with _running.lock:
            _running.count -= 1
            is_spoilt = not _running.count and own != _running.default
        if is_spoilt:
            thread = Thread(target=torch.set_num_threads, args=(_running.default,))
            thread.start()
            thread.join()


class _Running:
    """How many calls of `share` are running, and the number of threads when the first of them began."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As it is where none runs."""
        self.lock, self.count, self.default = Lock(), 0, 1


_running = _Running()
if hasattr(os, "register_at_fork"):  # of the parent's calls none runs in the child
    os.register_at_fork(after_in_child=_running.reset)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the `backward` of an autograd function: refuse to be differentiated, which would go wrong in silence."""

    @wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fast paths can not be differentiated twice, as create_graph=True asks for: call "
                "hf_segformer.set_fast_paths(False) first"
            )
        with torch.autocast("cpu", enabled=False):  # as it was forwards
            return backward(ctx, *gradients)

    return checked


__all__ = ["set_fast_paths"]
