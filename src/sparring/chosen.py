"""The log-prob of each row's token among its logits, without anything else as wide as those.

On CPUs it is in C (`chosen.c`), which reads them in their own precision; elsewhere float32 copies are made, block by block,
or, while a model's layers are compiled (`compiled.py`), torch makes kernels of it that need no copies.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparring import native
from sparring.native import library

_BLOCK, _LARGE = 2**17, 2**25
"""Numbers of which float32 copies are made at a time: as stay in a CPU's cache, and as keep a GPU busy."""
_COMPILED: list[Callable[[Tensor, Tensor], Tensor]] = []
"""What takes the place of float32 copies within `compiled`."""


def chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token] [M], in nats, of [M, V] and [M]: in float32 or wider; gradients flow."""
    made = kernel(logits.dtype) if logits.device.type == "cpu" else None
    if made is None and _COMPILED and len(tokens):
        return _COMPILED[-1](logits, tokens)
    if made is None:
        return _InTorch.apply(logits, tokens)  # type: ignore[no-any-return, no-untyped-call]
    return _InC.apply(made, logits, tokens)  # type: ignore[no-any-return, no-untyped-call]


@contextlib.contextmanager
def compiled() -> Iterator[None]:
    """Within it torch compiles `chosen` where it is not in C, for any number of rows: one pass over logits for each direction."""
    _COMPILED.append(torch.compile(_whole, dynamic=True))
    try:
        yield
    finally:
        _COMPILED.pop()


def _whole(logits: Tensor, tokens: Tensor) -> Tensor:
    """`chosen`, of parts that a compiler joins; as it is, it would make several tables as wide as logits."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide = wide - wide.detach().amax(-1, keepdim=True)
    own = tokens[:, None] == torch.arange(logits.shape[1], device=logits.device)
    # Sums of a mask instead of an index: the gradient of that is scattered, which is joined with nothing
    return torch.where(own, wide, 0.0).sum(-1) - wide.exp().sum(-1).log()


class Kernel(NamedTuple):
    """Both directions, compiled for a precision."""

    forward: Any
    backward: Any


@cache
def kernel(dtype: torch.dtype) -> Kernel | None:
    """The kernel for logits of this precision; None where it cannot be had."""
    sizes = native.sized(dtype)
    if sizes is None:
        return None
    return native.tried(
        lambda: _loaded(sizes),
        lambda made: _problem(made, dtype),
        "log-probs in C cannot be had, passes take longer",
    )


def _loaded(sizes: dict[str, int]) -> Kernel:
    made = library("chosen.c", sizes)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    made.forward.argtypes = [*[pointer] * 5, number, number]
    made.backward.argtypes = [*[pointer] * 6, number, number]
    made.forward.restype = made.backward.restype = None
    return Kernel(made.forward, made.backward)


def _problem(made: Kernel, dtype: torch.dtype) -> str | None:
    """What is wrong with a kernel, tried on three rows of random numbers; None where nothing is."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1100, generator=random, dtype=torch.float32).mul(4).to(dtype)
    tokens, upstream = torch.tensor([0, 1099, 500]), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float32)
    found: list[tuple[Tensor, Tensor]] = []
    with native.apart():
        for wide in (False, True):
            own = (logits.float() if wide else logits.clone()).requires_grad_()
            out = _InTorch.apply(own, tokens) if wide else _InC.apply(made, own, tokens)  # type: ignore[no-untyped-call]
            found.append((out.detach(), torch.autograd.grad(out, own, upstream)[0].float()))
    apart = native.most((a - b).abs().max() for a, b in zip(*found, strict=True))
    return None if apart < (1e-2 if dtype == torch.bfloat16 else 1e-5) else f"its results are off by {apart:.2g}"


class _InC(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, logits: Tensor, tokens: Tensor) -> Tensor:
        logits, tokens = logits.contiguous(), tokens.contiguous()
        least, most = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
        if len(tokens) and not 0 <= least <= most < logits.shape[1]:
            raise IndexError(
                f"a token is beyond the {logits.shape[1]} of the vocabulary: {least if least < 0 else most}"
            )
        out: Tensor
        out, tops, sums = torch.empty(3, len(logits), dtype=torch.float32)
        kernel.forward(*(x.data_ptr() for x in (logits, tokens, out, tops, sums)), *logits.shape)
        ctx.save_for_backward(logits, tokens, tops, sums)
        ctx.kernel = kernel
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, tokens, tops, sums = ctx.saved_tensors
        grad, out = grads[0].contiguous(), torch.empty_like(logits)
        given = (logits, tokens, tops, sums, grad, out)
        ctx.kernel.backward(*(x.data_ptr() for x in given), *logits.shape)
        return None, out, None


class _InTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        parts = torch.split(logits, _rows(logits))  # type: ignore[no-untyped-call]
        total = torch.cat([x.to(wide).logsumexp(-1) for x in parts])
        ctx.save_for_backward(logits, tokens)
        out: Tensor = logits.gather(-1, tokens[:, None])[:, 0].to(wide).sub_(total)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, tokens = ctx.saved_tensors
        grad = grads[0][:, None]
        out = torch.empty_like(logits)
        for at in range(0, len(logits), _rows(logits)):
            block = slice(at, at + _rows(logits))
            share = torch.softmax(logits[block], -1, dtype=grad.dtype).mul_(-grad[block])
            out[block] = share.scatter_add_(1, tokens[block, None], grad[block])
        return out, None


def _rows(logits: Tensor) -> int:
    """Rows of logits that are copied at a time."""
    return max(1, (_BLOCK if logits.device.type == "cpu" else _LARGE) // logits.shape[-1])
