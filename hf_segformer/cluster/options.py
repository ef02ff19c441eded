"""Options of prediction on a cluster; nothing here imports Ray or PyTorch."""

import re
from dataclasses import dataclass

INSTALL = "pip install 'hf-segformer[ray]'"
_SCHEMES = ("s3", "gs", "file")


@dataclass(frozen=True)
class ClusterOptions:
    """Resources of prediction on a Ray cluster.

    Args:
        actors: smallest and largest number of processes that predict; a largest number of None is as many as the
            cluster has room for, which an autoscaling cluster makes.
        gpus_per_actor: GPUs of each process; 0.5 lets two of them share one, 0 predicts on CPUs.
        cpus_per_actor: CPUs of each process, which is also its number of threads.
        retries: how often images are predicted again after the process that predicted them has died.
        address: of the cluster, `HOST:PORT`, or `auto` for the one of this machine; None starts one on this machine.

    Raises:
        ValueError: if a value is out of range.

    Examples:
        >>> from hf_segformer.cluster.options import ClusterOptions
        >>> ClusterOptions(actors=(2, 8), gpus_per_actor=0.5).actors
        (2, 8)
    """

    actors: tuple[int, int | None] = (1, None)
    gpus_per_actor: float = 0.0
    cpus_per_actor: int = 1
    retries: int = 3
    address: str | None = None

    def __post_init__(self):
        least, most = self.actors
        if least < 1 or (most is not None and most < least):
            raise ValueError(f"actors is {least}:{most}; expected at least 1, and no more than the largest number")
        if not 0 <= self.gpus_per_actor < float("inf") or (self.gpus_per_actor > 1 and self.gpus_per_actor % 1):
            raise ValueError(f"gpus_per_actor is {self.gpus_per_actor}; expected a part of one GPU, or a whole number")
        if self.cpus_per_actor < 1:
            raise ValueError(f"cpus_per_actor is {self.cpus_per_actor}; expected at least 1")
        if self.retries < 0:
            raise ValueError(f"retries is {self.retries}; expected at least 0")
        place = re.fullmatch(r"auto|[^\s/:]+:([0-9]{1,5})", "auto" if self.address is None else self.address)
        if place is None or int(place[1] or 0) > 65535:
            raise ValueError(f"address is {self.address!r}; expected HOST:PORT, or auto for this machine's cluster")


def is_address(text: str) -> bool:
    """Return True for a URI, such as `s3://bucket/folder`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def check_address(address: str) -> None:
    """Raise ValueError unless a URI is one of object storage, or of files."""
    scheme = address.partition("://")[0]
    if scheme not in _SCHEMES:
        expected = ", ".join(f"{each}://" for each in _SCHEMES)
        raise ValueError(f"{shown_address(address)} is no address of object storage; expected one of {expected}")
    if "*" in address:
        raise ValueError(f"{shown_address(address)} is a pattern; expected an object, or a folder of objects")


def shown_address(address: str) -> str:
    """A URI without the keys and options that it may hold; keys that are not percent-encoded may hold "/" and "?".

    Examples:
        >>> from hf_segformer.cluster.options import shown_address
        >>> shown_address("s3://KEY:SECRET@bucket/drives?region=eu-west-1")
        's3://bucket/drives'
    """
    scheme, _, rest = address.partition("://")
    place, _, query = rest.partition("?")
    if "@" in query:  # keys with a "?", or options with keys: which is not known
        return f"{scheme}://..."
    host, slash, path = re.sub(r".*:.*@", "", place, flags=re.DOTALL).partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


__all__ = ["INSTALL", "ClusterOptions", "check_address", "is_address", "shown_address"]
