"""Processes that share one job, as torchrun and `accelerate launch` start them."""

import os
from datetime import timedelta
from typing import Any

import torch


class DistributedContext:
    """The processes of a job: one where nobody started more.

    Within a training the processes are those of its process group. Otherwise they meet over the CPU (gloo), and wait
    for each other as long as it takes.

    Attributes:
        rank: number of this process, from 0 on.
        num_processes: number of processes.
    """

    def __init__(self):
        is_available = torch.distributed.is_available()
        if is_available and torch.distributed.is_initialized():
            self.rank, self.num_processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
            self._is_own = False
            return
        self.rank, self.num_processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._is_own = self.num_processes > 1
        if self._is_own:
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))

    @property
    def is_main(self) -> bool:
        """True in the first process."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, in the order of their ranks, to every process; all wait for each other."""
        if self.num_processes == 1:
            return [value]
        values: list[Any] = [None] * self.num_processes
        torch.distributed.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """Leave a process group that this object created."""
        if self._is_own:
            torch.distributed.destroy_process_group()


__all__ = ["DistributedContext"]
