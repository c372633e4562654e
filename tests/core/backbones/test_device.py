"""What training on a CPU does with the memory it frees, each case in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the thresholds are glibc's")

SETUP = """
import resource, torch
from sapt_core.backbones.device import keep_freed_memory

def peak():  # bytes; not ru_maxrss, which begins with the parent's
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

torch.set_num_threads(1)
keep_freed_memory("cpu")
"""

ODD_BLOCKS = """
def block(mib):  # touched, so that it counts
    return torch.ones(int(mib * 2**20) // 4)

before, small = peak(), []
for step in range(3):
    large = []
    for index in range(6):
        large.append(block(40 + 3 * step + index))
        small.append(block(0.25))  # stays: the block before has a neighbour that is not free
    most = sum(tensor.nbytes for tensor in large)
    del large
print((peak() - before) / most)
"""

SMALL_STEPS = """
def step():
    return len([torch.ones(2**20 // 4 + 1000 * index) for index in range(80)])

for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


def run(code: str) -> float:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", SETUP + code]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_the_peak_of_large_blocks_of_growing_sizes_is_what_is_held_at_once() -> None:
    # Taken from the heap, each step's blocks are too long for the holes that the step before left.
    assert run(ODD_BLOCKS) < 1.1


def test_a_small_models_step_takes_no_pages_anew() -> None:
    # A step's 92 MiB are 23,600 pages of 4 KiB.
    assert run(SMALL_STEPS) < 200
