"""Memory that is freed and taken again costs nothing once it is kept."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
if sys.argv[1] == "keep":
    from sparring import heap
    heap.keep()
def blocks():
    for _ in range(10):
        x = torch.ones(2**24)
        del x
blocks()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
blocks()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_blocks_are_cleared_once() -> None:
    """Ten blocks of 64 MB are 160,000 pages of 4 kB, or 320 of 2 MB; kept, not one of them is taken anew."""

    def faults(how: str, **more: str) -> int:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | more
        return int(
            subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, check=True, env=kept).stdout
        )

    assert faults("keep") < 100 < faults("leave")
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="1000000") > 100  # whoever sets that has it so
