"""Triton kernels for GPUs, which fill their rows of the dispatch table: see `switch`."""
