"""How many CPU threads a model computes with: as many as are fastest here and now, found by timing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

ROWS, TOKENS = 64, 32
"""Of a timed pass, like one of training a small model; a single row of a few hundred tokens would say that one thread does."""
REPEATS = 5
LARGE = 0.5
"""Seconds of one pass above which a model is taken to use every thread: timing would take longer than it saves."""
WORTH = 0.05
"""More threads must save this share of the time: on a machine that others use too, they are the first to be late."""


FILE = "threads.json"
"""What was found, in a run's folder: a run that goes on computes with as many, so its results repeat to the bit."""


def allowed() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def available() -> int:
    """How many threads torch would use by itself: the cores, or OMP_NUM_THREADS."""
    import torch

    return torch.get_num_threads()


def use(number: int) -> None:
    """Compute with so many threads from here on."""
    import torch

    available()
    torch.set_num_threads(number)


def settled(record: Mapping[str, Any], model: nn.Module, context: int) -> Mapping[str, Any]:
    """What was found for as many cores, where that is on record, or what is found now by passes of a model."""
    most = available()
    if record.get("available") == most:
        return record
    seconds = time_model(model, most, context)
    return {"available": most, "threads": fewest(seconds) if seconds else most, "seconds": seconds}


def candidates(most: int) -> list[int]:
    """Numbers of threads to try: 1, 2, 4, … below `most`, and `most`."""
    return [*(1 << n for n in range(most.bit_length()) if 1 << n < most), most]


def fewest(seconds: Mapping[int, float]) -> int:
    """The smallest number of threads that takes at most 1 / (1 - WORTH) of the shortest time."""
    best = min(seconds.values())
    return min(n for n, time in seconds.items() if time * (1 - WORTH) <= best)


def timed(passes: Callable[[], object], most: int) -> dict[int, float]:
    """Seconds of a pass for every number of threads that is worth trying, the shortest of REPEATS in turn.

    Empty where a pass takes longer than LARGE.
    """

    def once(threads: int) -> float:
        use(threads)
        began = time.perf_counter()
        passes()
        return time.perf_counter() - began

    if min(once(most), once(most)) > LARGE:
        return {}
    seconds = {n: once(n) for n in candidates(most)}
    for _ in range(REPEATS - 1):
        seconds = {n: min(before, once(n)) for n, before in seconds.items()}
    return seconds


def time_model(model: nn.Module, most: int, context: int) -> dict[int, float]:
    """`timed` for a forward pass over ROWS rows of TOKENS tokens, or as many as a model takes."""
    import torch

    ids = torch.zeros(ROWS, min(TOKENS, context), dtype=torch.long)
    with torch.no_grad():
        return timed(lambda: model(input_ids=ids), most)
