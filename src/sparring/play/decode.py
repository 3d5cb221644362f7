"""Attention of one token per row in C (`decode.c`), compiled for a model's sizes when they are first decoded on a CPU.

torch's own kernel computes every row as if it were as long as the longest; this one takes a row's own keys, once for all
query heads that share them, and stores the new ones on its way. Where there is no compiler, or what it made computes
something else, decoding goes on without, slower.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from sparring import native
from sparring.native import library

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""query [N, heads, D], the new key and value [N, key heads, D], all keys and values [≥ N, key heads, room, D], which of
them a row sees (from and to, int64 [N]; the new ones go to the last place) and a scale: to [N, heads, D]."""


@cache
def kernel(dtype: torch.dtype, groups: int, shared: int, width: int) -> Kernel | None:
    """The kernel for so many key heads, query heads for each and numbers a head; None where it cannot be had."""
    sizes = native.sized(dtype, GROUPS=groups, SHARED=shared, WIDTH=width)
    if sizes is None:
        return None
    return native.tried(
        lambda: _wrapped(library("play/decode.c", sizes)),
        lambda made: _problem(made, dtype, groups, shared, width),
        "attention in C cannot be had, decoding takes longer",
    )


def _wrapped(library: ctypes.CDLL) -> Kernel:
    function = library.decode
    function.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int64] * 2 + [ctypes.c_float]
    function.restype = None

    def attend(
        query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, first: Tensor, end: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        out = torch.empty_like(query)
        tensors = (query, key, value, keys, values, out, first, end)
        function(*(x.data_ptr() for x in tensors), len(query), keys.shape[2], scale)
        return out

    return attend


def _problem(made: Kernel, dtype: torch.dtype, groups: int, shared: int, width: int) -> str | None:
    """What is wrong with a kernel, tried on three rows of random numbers; None where nothing is."""
    random = torch.Generator().manual_seed(0)
    ends, room = (1, 33, 70), 70

    def states(*shape: int) -> Tensor:
        return torch.randn(*shape, width, generator=random).to(dtype)

    query, keys, values = states(3, groups * shared), states(3, groups, room), states(3, groups, room)
    key, value = (torch.stack([x[row, :, end - 1] for row, end in enumerate(ends)]) for x in (keys, values))
    first, end = torch.tensor([0, 5, 0]), torch.tensor(ends)
    got = made(query, key, value, keys.clone(), values.clone(), first, end, width**-0.5)
    place = torch.arange(room)
    seen = (place >= first[:, None]) & (place < end[:, None])
    folded = query.view(3, groups, shared, width).float()
    right = functional.scaled_dot_product_attention(folded, keys.float(), values.float(), seen[:, None, None])
    apart = float((got.view_as(right).float() - right).abs().max())
    return None if apart < (3e-2 if dtype == torch.bfloat16 else 1e-5) else f"its results are off by {apart:.2g}"
