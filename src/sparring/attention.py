"""Attention over rows of several sequences, in any transformers model that lets its attention be chosen.

Such a model computes tokens independently of each other but in two places: it asks for a mask, and it hands queries,
keys and values to a function. Both are named by its configuration; here both are ours. Tokens of many sequences then lie
in one row without padding, and a `Layout` says which of them belong together. The mask is the model's own rule over
positions (causal, sliding window, chunked), so what a token may see is never guessed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparring.batching import MOST_SCORES, SHORT, Tile, filler, rounded, tiles

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


class _Whole(torch.autograd.Function):
    """`scores` without a cap, for learning on a CPU: all queries of short rows together."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        rows, heads, size, width = query.shape
        query = (query * scale).reshape(rows, key.shape[1], -1, width)
        key, value = key.contiguous(), value.contiguous()
        weights = torch.matmul(query, key.transpose(-1, -2))
        weights.view(rows, -1, size, size).add_(bias[:, None])
        weights = weights.softmax(-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale = scale
        return torch.matmul(weights, value).view(rows, heads, size, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        grad = grads[0].reshape(*query.shape[:3], -1)
        of_value = torch.matmul(weights.transpose(-1, -2), grad)
        of_weights = torch.matmul(grad, value.transpose(-1, -2))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_key = torch.matmul(of_scores.transpose(-1, -2), query)
        of_query = torch.matmul(of_scores, key).mul_(ctx.scale)
        return of_query.view(*grads[0].shape[:3], -1), of_key, of_value, None, None


class _Seen(NamedTuple):
    """A tile of a row of tokens, and what its queries may see."""

    tile: Tile
    """Places in the whole row of rows."""
    first: int
    """Where its own row begins."""
    bias: Tensor
    """[queries, 1, last keys] with padding, 0 or −inf; all keys before those are seen."""
    keys: int
    """With padding."""

    def shape(self, shared: int) -> tuple[int, int]:
        return len(self.bias) * shared, self.keys

    def of(self, table: Tensor) -> Tensor:
        """Its keys [heads, K, D] of those [heads, N, D] of all, lying together; padding is whatever comes next."""
        (_, _, prompt, rest), first = self.tile, self.first
        if not prompt:
            return table[:, first : first + self.keys].contiguous()
        return torch.cat([table[:, first : first + prompt], table[:, rest : rest + self.keys - prompt]], 1)

    def add(self, table: Tensor, of_keys: Tensor) -> None:
        """The other way round."""
        (_, _, prompt, rest), first = self.tile, self.first
        if prompt:
            table[:, first : first + prompt] += of_keys[:, :prompt]
            table[:, rest : rest + self.keys - prompt] += of_keys[:, prompt:]
        else:
            table[:, first : first + self.keys] += of_keys


class _Tiles(torch.autograd.Function):
    """`scores` without a cap, for learning on a CPU: tiles of long rows, one after the other, each in the cache.

    What is wide is written to the same place again and again, but for the weights that are kept for the backward pass;
    where they are not, they are made again. Queries, keys, values and the output are [N, heads, D]; gradients of keys
    and values, to which several tiles add, are summed in float32 or wider.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, seen: Sequence[_Seen], scale: float, keep: bool
    ) -> Tensor:
        (tokens, heads, width), groups = query.shape, key.shape[1]
        shared, room = heads // groups, max(max(s.shape(1)) for s in seen)
        query = _apart(query, groups, room).view(groups, -1, width)
        key, value = _apart(key * scale, groups, room), _apart(value, groups, room)  # keys are fewer than queries
        out = value.new_empty(groups, tokens * shared, value.shape[-1])
        place, kept = _place(value, seen, shared), []
        again = place if keep else torch.empty_like(place)
        for s in seen:
            own, (at, end) = slice(s.tile.start * shared, s.tile.end * shared), s.shape(shared)
            weights = value.new_empty(groups, at, end) if keep else again[: groups * at * end].view(groups, at, end)
            _weigh(query, key, s, shared, place, weights)
            kept += [weights] * keep
            out[:, own] = torch.bmm(weights, s.of(value))[:, : own.stop - own.start]
        ctx.save_for_backward(query, key, value, *kept)
        ctx.seen, ctx.scale, ctx.shared = seen, scale, shared
        return _together(out.view(groups, tokens, -1), heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        tokens, heads = grads[0].shape[:2]
        groups, shared, seen = len(key), ctx.shared, ctx.seen
        grad = _apart(grads[0], groups, key.shape[1] - tokens).view(groups, -1, value.shape[-1])
        of_query = query.new_empty(groups, tokens * shared, query.shape[-1])
        wide = torch.promote_types(key.dtype, torch.float32)
        of_key, of_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        places = [_place(value, seen, shared) for _ in range(2 if kept else 3)]
        for i, s in enumerate(seen):
            start, (at, end) = s.tile.start * shared, s.shape(shared)
            own = slice(start, s.tile.end * shared)
            of_weights, of_scores, *made = (p[: groups * at * end].view(groups, at, end) for p in places)
            weights = kept[i] if kept else _weigh(query, key, s, shared, places[0], made[0])
            queries, upstream = (x[:, start : start + at] for x in (query, grad))
            s.add(of_value, torch.bmm(weights.transpose(-1, -2), upstream))
            torch.bmm(upstream, s.of(value).transpose(-1, -2), out=of_weights)
            torch._softmax_backward_data(of_weights, weights, -1, weights.dtype, grad_input=of_scores)
            s.add(of_key, torch.bmm(of_scores.transpose(-1, -2), queries))
            of_query[:, own] = torch.bmm(of_scores, s.of(key))[:, : own.stop - own.start]
        found = of_query.view(groups, tokens, -1), of_key[:, :tokens].mul_(ctx.scale), of_value[:, :tokens]
        of = (_together(x.to(key.dtype), n) for x, n in zip(found, (heads, groups, groups), strict=True))
        return *of, None, None, None


def _apart(states: Tensor, groups: int, room: int) -> Tensor:
    """[N, heads, D] to [groups, N + room, heads / groups · D], zero behind N."""
    tokens = len(states)
    out = states.new_empty(groups, tokens + room, states[0].numel() // groups)
    out[:, :tokens] = states.reshape(tokens, groups, -1).transpose(0, 1)
    out[:, tokens:] = 0
    return out


def _together(states: Tensor, heads: int) -> Tensor:
    """[groups, N, heads / groups · D] to [N, heads, D]."""
    return states.transpose(0, 1).reshape(states.shape[1], heads, -1)


def _place(like: Tensor, seen: Sequence[_Seen], shared: int) -> Tensor:
    return like.new_empty(max(math.prod(s.shape(shared)) for s in seen) * len(like))


def _weigh(query: Tensor, key: Tensor, seen: _Seen, shared: int, place: Tensor, weights: Tensor) -> Tensor:
    """Attention weights of a tile [groups, queries · shared, keys], written to `weights` by way of `place`.

    Queries that are its padding are another tile's: their weights are zero, so that none of theirs is added to a gradient.
    """
    (groups, at, end), start = weights.shape, seen.tile.start * shared
    made = torch.bmm(
        query[:, start : start + at], seen.of(key).transpose(-1, -2), out=place[: weights.numel()].view_as(weights)
    )
    made.view(groups, -1, shared, end)[..., end - seen.bias.shape[-1] :].add_(seen.bias)
    torch.softmax(made, -1, out=weights)
    weights[:, seen.tile.end * shared - start :] = 0
    return weights


class Tree:
    """Prompts, each followed by its completions, which see their prompt and themselves but not each other.

    The last token of a completion predicts nothing, so it is not in the row.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        device: torch.device,
        *,
        fill: bool = False,
    ) -> None:
        """`completions[b]` are those of `prompts[b]`; neither a prompt nor a completion is empty.

        With `fill` the row is as long as other rows of about as many tokens (`batching.filler`).
        """
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
        if more := fill * filler(len(ids)):
            # A row that nothing is asked of: none sees it, so that it gets no gradient
            ids += ids[:1] * more
            positions += [0] * more
            segments.append([more])
        self._segments = segments
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
        self._seen: dict[tuple[int, torch.dtype], tuple[Rule, list[_Seen]]] = {}
        self.asked = False
        """Whether any layer's attention came here."""

    def attend(self, layer: int, states: States, rule: Rule) -> Tensor:
        self.asked = True
        heads, scale = states.query.shape[1], states.scale
        learns = torch.is_grad_enabled() and states.query.requires_grad and states.query.device.type == "cpu"
        few = heads * self.rows * self.width**2 <= MOST_SCORES
        if learns and states.softcap is None and not (few and self.width <= SHORT):
            seen = self._tiles(rule, states.query.dtype)
            keep = heads * sum(math.prod(s.shape(1)) for s in seen) <= MOST_SCORES
            return _Tiles.apply(states.query, states.key, states.value, seen, scale, keep)  # type: ignore[no-any-return, no-untyped-call]
        query, key, value = (self._padded(x) for x in (states.query, states.key, states.value))
        if states.softcap is not None:
            mixed = scores(query, key, value, self._bias(rule, query.dtype), scale, states.softcap)
        elif learns:
            # On CPU the fused kernel is three times as fast as two products, and its backward pass slower than theirs
            mixed = _Whole.apply(query, key, value, self._bias(rule, query.dtype), scale)  # type: ignore[no-untyped-call]
        else:
            shared = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (key, value))
            mixed = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=self._mask(rule)[:, None], scale=scale
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

    def _tiles(self, rule: Rule, dtype: torch.dtype) -> Sequence[_Seen]:
        """Parts of all rows, in order."""
        if (id(rule), dtype) not in self._seen:
            longest = torch.arange(int(self.positions.max()) + 1)
            zero = torch.zeros((), dtype=torch.long)
            forward = not bool(rule(zero, zero, longest[:, None], longest).triu(1).any())
            firsts = [0, *accumulate(map(sum, self._segments))]
            self._seen[id(rule), dtype] = (
                rule,
                [
                    self._see(tile, b, first, rule, dtype)
                    for b, (first, segments) in enumerate(zip(firsts, self._segments, strict=False))
                    for tile in tiles(segments, half=dtype.itemsize == 2, forward=forward)
                ],
            )
        return self._seen[id(rule), dtype][1]

    def _see(self, tile: Tile, row: int, first: int, rule: Rule, dtype: torch.dtype) -> _Seen:
        half = dtype.itemsize == 2
        queries, keys = tile.end - tile.start, rounded(tile.keys, half=half)
        own = slice(tile.start, tile.end)
        segment, position = (
            torch.cat([table[row, : tile.prompt], table[row, tile.rest : tile.end]])
            for table in (self._segment, self._position)
        )
        zero = torch.zeros((), dtype=torch.long)
        mask = (segment == 0) | (segment == self._segment[row, own, None])
        mask &= rule(zero, zero, self._position[row, own, None], position)
        behind = int(mask.all(0).logical_not().to(torch.uint8).argmax()) if not mask.all() else tile.keys
        clear = min(behind, keys - 1) // 32 * 32
        bias = torch.zeros(rounded(queries, half=half), keys - clear, dtype=dtype)
        bias[:queries, : tile.keys - clear].masked_fill_(~mask[:, clear:], -torch.inf)
        bias[:queries, tile.keys - clear :] = -torch.inf
        moved = Tile(first + tile.start, first + tile.end, tile.prompt, first + tile.rest)
        return _Seen(moved, first, bias[:, None], keys)

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
