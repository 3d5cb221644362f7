"""Attention of `Tree`'s rows in C (`spans.c`), for CPUs: each token over the two spans of its row that it sees.

Nothing is padded, copied or kept but a number or two per token and head: weights are made again in the backward pass.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparring import native
from sparring.attention import Rule
from sparring.native import library
from sparring.tiles import scores

_ROWS = 2**22
"""Pairs of positions that a rule is asked of at a time."""


class Rows(NamedTuple):
    """Rows of a prompt and its completions one after the other, none of which has to have a token."""

    firsts: Tensor
    """int64 [rows + 1]: where rows begin, and the end."""
    sizes: Tensor
    """[segments] tokens of each prompt and completion."""
    start: Tensor
    """[segments] where a segment's row begins."""
    prompt_end: Tensor
    """[segments] where the prompt of its row ends."""
    own: Tensor
    """[segments] where it begins itself."""

    def positions(self) -> Tensor:
        """[N] of tokens, each completion's behind its prompt."""
        behind = torch.where(self.own == self.start, self.start, self.start + self.own - self.prompt_end)
        return torch.arange(int(self.firsts[-1])) - behind.repeat_interleave(self.sizes)

    def predicting(self, which: Tensor) -> Tensor:
        """Where the tokens of segments (bool [segments]), and one more of each, are predicted: by the one before."""
        sizes, own = self.sizes[which] + 1, self.own[which]
        place = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        own, before = (x.repeat_interleave(sizes) for x in (own, self.prompt_end[which]))
        return torch.where(place == 0, before, own + place) - 1


def rows(segments: Sequence[Sequence[int]]) -> Rows:
    """Those of so many tokens: a prompt's first, which are not none, then each completion's."""
    sizes = torch.tensor([size for row in segments for size in row])
    counts = torch.tensor([len(row) for row in segments])
    behind, last = sizes.cumsum(0), counts.cumsum(0)
    firsts = torch.cat([last.new_zeros(1), behind[last - 1]])
    start, prompt_end = (x.repeat_interleave(counts) for x in (firsts[:-1], behind[last - counts]))
    return Rows(firsts, sizes, start, prompt_end, behind - sizes)


class Seen(NamedTuple):
    """What each token of some rows sees."""

    firsts: Tensor
    """int64 [rows + 1]: where rows begin, and the end."""
    spans: Tensor
    """int32 [3, N]: from and to of what a token sees of its prompt, from of what it sees of its own segment, up to itself."""


def seen(rows: Rows, positions: Tensor, rule: Rule) -> Seen | None:
    """None where a rule has tokens see others than the last ones up to themselves.

    A prompt's tokens whose positions are not theirs are what rows are filled up with: they see themselves.
    """
    lowest = _lowest(rule, int(positions.max()) + 1)
    if lowest is None:
        return None
    start, prompt_end, own = (x.repeat_interleave(rows.sizes) for x in (rows.start, rows.prompt_end, rows.own))
    at, low, inside = torch.arange(len(positions)), lowest[positions], own == start
    prompt = torch.where(inside, prompt_end, torch.minimum(start + low, prompt_end))
    mine = torch.where(inside, start + low, own + (low - (prompt_end - start)).clamp(min=0))
    mine = torch.where(inside & (positions != at - start), at, mine)
    return Seen(rows.firsts, torch.stack([prompt, prompt_end, mine]).int())


def _lowest(rule: Rule, longest: int) -> Tensor | None:
    """First position, [longest], that a token sees of those before it; None unless it sees all from there on, and itself."""
    place, zero = torch.arange(longest), torch.zeros((), dtype=torch.long)
    found = []
    for some in torch.split(place, max(1, _ROWS // longest)):
        mask = rule(zero, zero, some[:, None], place).expand(len(some), longest)
        first = mask.to(torch.uint8).argmax(1)
        if not torch.equal(mask, (place >= first[:, None]) & (place <= some[:, None])):
            return None
        found.append(first)
    return torch.cat(found)


class Kernel(NamedTuple):
    """Both directions, compiled for a model's heads."""

    forward: Any
    backward: Any


@cache
def kernel(dtype: torch.dtype, groups: int, shared: int, width: int) -> Kernel | None:
    """The kernel for so many key heads, query heads for each and numbers a head; None where it cannot be had."""
    sizes = native.sized(dtype, GROUPS=groups, SHARED=shared, WIDTH=width)
    if sizes is None:
        return None
    return native.tried(
        lambda: _loaded(sizes),
        lambda made: _problem(made, dtype, groups, shared, width),
        "attention in C cannot be had, passes take longer",
    )


def _loaded(sizes: dict[str, int]) -> Kernel:
    made = library("spans.c", sizes)
    if made.refused():  # a container, or an old kernel, may not let it use the CPU's tiles
        made = library("spans.c", sizes | {"UNTILED": 1})
    pointer, number, scale = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    made.forward.argtypes = [*[pointer] * 9, number, scale]
    made.backward.argtypes = [*[pointer] * 13, number, scale]
    return Kernel(made.forward, made.backward)


def attend(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, seen: Seen, scale: float) -> Tensor:
    """Attention [N, heads, D] of queries [N, heads, D] over keys and values [N, key heads, D]; gradients flow."""
    if not len(query) == len(key) == len(value) == seen.spans.shape[1]:
        raise ValueError(f"{len(query)} queries and {len(key)} keys for rows of {seen.spans.shape[1]} tokens")
    return _Attention.apply(kernel, query, key, value, seen, scale)  # type: ignore[no-any-return, no-untyped-call]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, seen: Seen, scale: float
    ) -> Tensor:
        query, key, value = (_dense(x) for x in (query, key, value))
        out = torch.empty(query.shape, dtype=query.dtype)
        tops, shares = torch.empty(2, query.shape[1], len(query), dtype=torch.float32)
        strides = _strides(query, key, value)
        given = (query, key, value, strides, seen.firsts, seen.spans, out, tops, shares)
        _call(kernel.forward, given, seen, scale)
        ctx.save_for_backward(query, key, value, out, tops, shares)
        ctx.rest = kernel, seen, scale
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, tops, shares = ctx.saved_tensors
        kernel, seen, scale = ctx.rest
        grad = _dense(grads[0])
        strides = _strides(query, key, value, grad)
        of = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))
        given = (query, key, value, grad, strides, seen.firsts, seen.spans, out, tops, shares, *of)
        _call(kernel.backward, given, seen, scale)
        return None, *of, None, None


def _call(function: Any, tensors: Sequence[Tensor], seen: Seen, scale: float) -> None:
    if function(*(x.data_ptr() for x in tensors), len(seen.firsts) - 1, scale):
        raise MemoryError(f"attention: no memory for a row of {int(seen.firsts.diff().max())} tokens")


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> Tensor:
    return torch.tensor([x.stride(axis) for x in tensors for axis in (0, 1)])


def _problem(made: Kernel, dtype: torch.dtype, groups: int, shared: int, width: int) -> str | None:
    """What is wrong with a kernel, tried on two rows of random numbers; None where nothing is."""
    random = torch.Generator().manual_seed(0)
    made_of, size = rows([[20, 30], [9]]), 59
    table = seen(made_of, made_of.positions(), lambda b, h, q, k: k <= q)
    assert table is not None
    heads = groups * shared
    query, key, value, upstream = (
        torch.randn(size, n, width, generator=random, dtype=torch.float32).to(dtype)
        for n in (heads, groups, groups, heads)
    )
    row = torch.tensor([0] * 50 + [1] * 9)
    hidden = (row != row[:, None]) | (torch.arange(size) > torch.arange(size)[:, None])
    bias = torch.zeros(size, size, dtype=torch.float32).masked_fill(hidden, -torch.inf)
    found = []
    for inner in (True, False):
        leaves = [x.detach().to(dtype if inner else torch.float32).requires_grad_() for x in (query, key, value)]
        with native.apart():
            if inner:
                out = attend(made, leaves[0], leaves[1], leaves[2], table, width**-0.5)
            else:
                q, k, v = (x.transpose(0, 1)[None] for x in leaves)
                out = scores(q, k, v, bias[None], width**-0.5, None)[0].transpose(0, 1)
            found.append([out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))])
    # Beside the largest: a value's gradient is a sum over the query heads that share it
    errors = ((a.float() - b).abs().max() / b.abs().max().clamp(min=1) for a, b in zip(*found, strict=True))
    apart = native.most(errors)
    return None if apart < (1e-2 if dtype == torch.bfloat16 else 2e-5) else f"its results are off by {apart:.2g}"
