"""Attention over rows of several sequences, in any transformers model that lets its attention be chosen.

Such a model computes tokens independently of each other but in two places: it asks for a mask, and it hands queries,
keys and values to a function. Both are named by its configuration; here both are ours. Tokens of many sequences then lie
in one row without padding, and a `Layout` says which of them belong together. The mask is the model's own rule over
positions (causal, sliding window, chunked), so what a token may see is never guessed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparring.batching import MOST_SCORES, blocks

NAME = "sparring"
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A model's own word on (batch, head, query position, key position): True where the query may see the key."""


class Layout(Protocol):
    """Which tokens of a row belong together."""

    def attend(self, layer: int, states: States, rule: Rule) -> Tensor:
        """Attention's output [N, heads, D] of a row of N tokens."""
        ...


@dataclass(frozen=True)
class States:
    """What a layer hands to its attention."""

    query: Tensor
    """[N, heads, D]"""
    key: Tensor
    """[N, key heads, D]"""
    value: Tensor
    """[N, key heads, D]"""
    scale: float
    softcap: float | None


def scores(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention [B, heads, Q, D] from [B, heads, Q, D], [B, key heads, K, D] and a bias [B, Q, K], 0 or −inf.

    Query heads that share a key head are taken together, so that keys are not copied.
    """
    rows, heads, size, width = query.shape
    shared = heads // key.shape[1]
    wide = (query * scale).reshape(rows, key.shape[1], shared * size, width)
    weights = torch.matmul(wide, key.transpose(-1, -2)).view(rows, key.shape[1], shared, size, -1)
    if softcap is not None:
        weights = torch.tanh(weights / softcap) * softcap
    weights = (weights + bias[:, None, None]).softmax(-1).view(rows, key.shape[1], shared * size, -1)
    return torch.matmul(weights, value).view(rows, heads, size, -1)


class _Blocks(torch.autograd.Function):
    """`scores` without a cap, for learning on a CPU: a block of queries at a time, against keys up to the block's end.

    In long rows that is half of the scores, in the backward pass too. Its arguments are those of `scores`, and the ends
    of the blocks: behind its block's end no query may see a key.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, ends: Sequence[int]
    ) -> Tensor:
        rows, heads, size, width = query.shape
        shared = heads // key.shape[1]
        # Products of parts of what lies together take no copies
        query = (query * scale).reshape(rows, -1, shared, size, width)
        key, value = key.contiguous(), value.contiguous()
        mixed = value.new_empty(rows, size, heads, value.shape[-1])
        out = mixed.view(rows, size, -1, shared, value.shape[-1]).permute(0, 2, 3, 1, 4)
        kept = []
        for at, end in pairwise((0, *ends)):
            weights = torch.matmul(query[:, :, :, at:end].flatten(2, 3), key[:, :, :end].transpose(-1, -2))
            weights.view(rows, -1, shared, end - at, end).add_(bias[:, None, None, at:end, :end])
            weights = weights.softmax(-1)
            out[:, :, :, at:end] = torch.matmul(weights, value[:, :, :end]).view_as(out[:, :, :, at:end])
            kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale, ctx.ends = scale, ends
        return mixed.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        rows, groups, shared, size, width = query.shape
        grad = grads[0].reshape(rows, groups, shared, size, -1)
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (at, end), weights in zip(pairwise((0, *ctx.ends)), kept, strict=True):
            own, own_queries = grad[:, :, :, at:end].flatten(2, 3), query[:, :, :, at:end]
            of_value[:, :, :end] += torch.matmul(weights.transpose(-1, -2), own)
            of_weights = torch.matmul(own, value[:, :, :end].transpose(-1, -2))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_key[:, :, :end] += torch.matmul(of_scores.transpose(-1, -2), own_queries.flatten(2, 3))
            of_query[:, :, :, at:end] = torch.matmul(of_scores, key[:, :, :end]).view_as(own_queries)
        return of_query.mul_(ctx.scale).view(rows, -1, size, width), of_key, of_value, None, None, None


class Tree:
    """Prompts, each followed by its completions, which see their prompt and themselves but not each other.

    The last token of a completion predicts nothing, so it is not in the row.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]], device: torch.device
    ) -> None:
        """`completions[b]` are those of `prompts[b]`; neither a prompt nor a completion is empty."""
        ids: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        segments: list[list[int]] = []
        for prompt, own in zip(prompts, completions, strict=True):
            end = len(ids) + len(prompt) - 1
            ids += prompt
            positions += range(len(prompt))
            segments.append([len(prompt)])
            for completion in own:
                at = len(ids)
                keep += [end, *range(at, at + len(completion) - 1)]
                ids += completion[:-1]
                positions += range(len(prompt), len(prompt) + len(completion) - 1)
                segments[-1].append(len(completion) - 1)
        sizes = [sum(own) for own in segments]
        self.rows, self.width = len(sizes), max(sizes)
        place = [b * self.width + i for b, size in enumerate(sizes) for i in range(size)]
        segment = [[j for j, n in enumerate(own) for _ in range(n)] for own in segments]
        self.ids = torch.tensor([ids], device=device)
        """[1, N]"""
        self.positions = torch.tensor([positions], device=device)
        self.keep = torch.tensor(keep, device=device)
        """Where in the row each completion token is predicted, in order."""
        self._place = torch.tensor(place, device=device)
        self._segment = self._table(torch.tensor([j for own in segment for j in own], device=device), fill=-1)
        self._position = self._table(self.positions[0], fill=0)
        self._masks: dict[int, tuple[Rule, Tensor]] = {}
        self._biases: dict[tuple[int, torch.dtype], Tensor] = {}
        self._forward: dict[int, bool] = {}
        self.asked = False
        """Whether any layer's attention came here."""

    def attend(self, layer: int, states: States, rule: Rule) -> Tensor:
        self.asked = True
        query, key, value = (self._padded(x) for x in (states.query, states.key, states.value))
        mask = self._mask(rule)
        small = query.shape[0] * query.shape[1] * self.width**2 <= MOST_SCORES
        learns = torch.is_grad_enabled() and query.requires_grad
        if states.softcap is not None:
            mixed = scores(query, key, value, self._bias(rule, query.dtype), states.scale, states.softcap)
        elif learns and small and query.device.type == "cpu":
            # On CPU the fused kernel is three times as fast as two products, and its backward pass slower than theirs
            bias = self._bias(rule, query.dtype)
            mixed = _Blocks.apply(query, key, value, bias, states.scale, self._ends(rule))  # type: ignore[no-untyped-call]
        else:
            shared = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (key, value))
            mixed = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask[:, None], scale=states.scale
            )
        return _Unpad.apply(mixed.transpose(1, 2), self._place)  # type: ignore[no-any-return, no-untyped-call]

    def _mask(self, rule: Rule) -> Tensor:
        """[B, L, L] True where a query may see a key; padding sees its row's first token, so that no row is empty."""
        if id(rule) not in self._masks:
            segment, position = self._segment, self._position
            own = (segment[:, None, :] == 0) | (segment[:, :, None] == segment[:, None, :])
            zero = torch.zeros((), dtype=torch.long, device=position.device)
            seen = own & (segment[:, None, :] >= 0) & rule(zero, zero, position[:, :, None], position[:, None, :])
            seen[..., 0] |= segment < 0
            self._masks[id(rule)] = rule, seen
        return self._masks[id(rule)][1]

    def _bias(self, rule: Rule, dtype: torch.dtype) -> Tensor:
        """[B, L, L] 0 where a query may see a key and −inf elsewhere."""
        if (id(rule), dtype) not in self._biases:
            mask = self._mask(rule)
            self._biases[id(rule), dtype] = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
        return self._biases[id(rule), dtype]

    def _ends(self, rule: Rule) -> Sequence[int]:
        """Where blocks of queries end: of nearly equal size, one alone where a query sees what comes behind it."""
        if id(rule) not in self._forward:
            self._forward[id(rule)] = not bool(self._mask(rule).triu(1).any())
        number = blocks(self.width) if self._forward[id(rule)] else 1
        return [self.width * i // number for i in range(1, number + 1)]

    def _table(self, values: Tensor, fill: int) -> Tensor:
        table = values.new_full((self.rows * self.width,), fill)
        table[self._place] = values
        return table.view(self.rows, self.width)

    def _padded(self, states: Tensor) -> Tensor:
        return _Pad.apply(states, self._place, self.rows, self.width).transpose(1, 2)  # type: ignore[no-any-return, no-untyped-call]


class _Pad(torch.autograd.Function):
    """[N, …] to [rows, width, …]; indexing's own backward pass, made for repeated indices, is several times slower."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, place: Tensor, rows: int, width: int) -> Tensor:
        ctx.place = place
        return _spread(states, place, rows, width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].flatten(0, 1).index_select(0, ctx.place), None, None, None


class _Unpad(torch.autograd.Function):
    """[rows, width, …] to [N, …]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, place: Tensor) -> Tensor:
        ctx.place, (ctx.rows, ctx.width) = place, states.shape[:2]
        return states.flatten(0, 1).index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _spread(grads[0], ctx.place, ctx.rows, ctx.width), None


def _spread(states: Tensor, place: Tensor, rows: int, width: int) -> Tensor:
    out = states.new_zeros(rows * width, *states.shape[1:])
    return out.index_copy_(0, place, states).view(rows, width, *states.shape[1:])


def unwrapped(model: Any) -> Any:
    """The model itself, where an adapter's wrapper hides its forward."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Within it the model takes rows of several sequences and a `layout`, and no others; not for two threads at once."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [
        (c, c._attn_implementation_internal) for c in configs.values() if hasattr(c, "_attn_implementation_internal")
    ]
    _register()
    for config, _ in before:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def is_packed(model: nn.Module) -> bool:
    """Whether the model is within `packed`."""
    return getattr(getattr(model, "config", None), "_attn_implementation_internal", None) == NAME


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _opaque())
    AttentionMaskInterface.register(NAME, _mask)


@cache
def _opaque() -> Any:
    """`_attention` as compiled layers (`compiled.py`) call it: a layout is nothing to trace."""
    return torch.compiler.disable(_attention)  # type: ignore[no-untyped-call]


def _mask(*_: Any, mask_function: Rule, **__: Any) -> Rule:
    return mask_function


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Rule,
    *,
    layout: Layout,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """A layer's attention, [1, heads, N, D] each, to [1, N, heads, D]. Raises TypeError for what no layout can do."""
    if dropout or s_aux is not None or position_bias is not None or not callable(attention_mask):
        raise TypeError("its attention has dropout, sinks, biases or a mask of its own")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    states = States(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    with torch.autocast(device, enabled=False):
        return layout.attend(getattr(module, "layer_idx", -1), states, attention_mask)[None], None
