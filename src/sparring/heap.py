"""Memory that is freed stays with the process, in training on a CPU: a step takes the same blocks again and again.

Scoring, whose passes are small, gains little by it and would hold a fifth more.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Of glibc's mallopt(3)."""


@cache
def keep() -> None:
    """Have glibc keep freed blocks of any size until two gigabytes lie free at the end of the heap; nothing elsewhere.

    By default it gives blocks of more than 32 MB back to the system, which clears them page by page when they are taken
    anew: 15 percent of a step with compiled layers. Whoever tells glibc how to do it (`MALLOC_…_`, `GLIBC_TUNABLES`) has
    it so.
    """
    libc = ctypes.CDLL(None)
    told = any(name == "GLIBC_TUNABLES" or (name.startswith("MALLOC_") and name.endswith("_")) for name in os.environ)
    if told or not hasattr(libc, "gnu_get_libc_version"):
        return
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
        libc.mallopt(option, value)
