"""The allocator of programs that train: large blocks are not returned to the system."""

import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys
import torch
from hf_segformer.training.allocator import keep_freed_memory

assert not sys.argv[1:] or keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for _ in range(32):
    torch.full((48 * 2**20,), 1, dtype=torch.uint8)
print(faults() - before)
"""


def count_faults(*arguments):
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_used_again():
    kept, returned = count_faults("keep"), count_faults()
    assert kept < returned / 2  # a block may be allocated a few times before one fits for good
