"""A row of prompts with their completions, without padding: the layout of training and scoring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparring import spans
from sparring.attention import Rule, States
from sparring.batching import MOST_SCORES, SHORT, Tile, filler, rounded, tiles
from sparring.tiles import Seen, Tiles, Whole, scores


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
        segments: list[list[int]] = []
        for prompt, own in zip(prompts, completions, strict=True):
            ids += prompt
            for completion in own:
                ids += completion[:-1]
            segments.append([len(prompt), *(len(completion) - 1 for completion in own)])
        if more := fill * filler(len(ids)):
            # A row that nothing is asked of: none sees it, so that it gets no gradient
            ids += ids[:1] * more
            segments.append([more])
        self._segments = segments
        self._rows = spans.rows(segments)
        self.ids = torch.tensor([ids], device=device)
        """[1, N]"""
        positions = self._rows.positions()
        positions[len(ids) - more :] = 0
        self.positions = positions[None].to(device)
        self.keep = self._rows.predicting(torch.tensor([j > 0 for own in segments for j in range(len(own))])).to(device)
        """Where in the row each completion token is predicted, in order."""
        # By a rule's id, which stays its own as long as it is kept here
        self._spans: dict[int, tuple[Rule, spans.Seen | None]] = {}
        self._masks: dict[int, tuple[Rule, Tensor]] = {}
        self._biases: dict[tuple[int, torch.dtype], Tensor] = {}
        self._seen: dict[tuple[int, torch.dtype], tuple[Rule, list[Seen]]] = {}
        self.asked = False
        """Whether any layer's attention came here."""

    def attend(self, layer: int, states: States, rule: Rule) -> Tensor:
        self.asked = True
        heads, scale = states.query.shape[1], states.scale
        if (mixed := self._in_c(states, rule)) is not None:
            return mixed
        learns = torch.is_grad_enabled() and states.query.requires_grad and states.query.device.type == "cpu"
        rows, width = self._sizes
        few = heads * rows * width**2 <= MOST_SCORES
        if learns and states.softcap is None and not (few and width <= SHORT):
            seen = self._tiles(rule, states.query.dtype)
            keep = heads * sum(math.prod(s.shape(1)) for s in seen) <= MOST_SCORES
            return Tiles.apply(states.query, states.key, states.value, seen, scale, keep)  # type: ignore[no-any-return, no-untyped-call]
        query, key, value = (self._padded(x) for x in (states.query, states.key, states.value))
        if states.softcap is not None:
            mixed = scores(query, key, value, self._bias(rule, query.dtype), scale, states.softcap)
        elif learns:
            # On CPU the fused kernel is three times as fast as two products, and its backward pass slower than theirs
            mixed = Whole.apply(query, key, value, self._bias(rule, query.dtype), scale)  # type: ignore[no-untyped-call]
        else:
            shared = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (key, value))
            mixed = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=self._mask(rule)[:, None], scale=scale
            )
        return _Unpad.apply(mixed.transpose(1, 2), self._place)  # type: ignore[no-any-return, no-untyped-call]

    def _in_c(self, states: States, rule: Rule) -> Tensor | None:
        """Attention of a CPU's kernel; None where there is none for this."""
        query, key, value = states.query, states.key, states.value
        (_, heads, width), groups = query.shape, key.shape[1]
        if query.device.type != "cpu" or states.softcap is not None or value.shape[-1] != width:
            return None
        made = spans.kernel(query.dtype, groups, heads // groups, width)
        if made is None:
            return None
        if id(rule) not in self._spans:
            self._spans[id(rule)] = rule, spans.seen(self._rows, self.positions[0], rule)
        seen = self._spans[id(rule)][1]
        return None if seen is None else spans.attend(made, query, key, value, seen, states.scale)

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

    def _tiles(self, rule: Rule, dtype: torch.dtype) -> Sequence[Seen]:
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

    def _see(self, tile: Tile, row: int, first: int, rule: Rule, dtype: torch.dtype) -> Seen:
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
        return Seen(moved, first, bias[:, None], keys)

    @cached_property
    def _sizes(self) -> tuple[int, int]:
        """Rows, and the longest's tokens."""
        sizes = [sum(own) for own in self._segments]
        return len(sizes), max(sizes)

    @cached_property
    def _place(self) -> Tensor:
        """Where each token is in a table [rows, width]."""
        _, width = self._sizes
        place = [b * width + i for b, own in enumerate(self._segments) for i in range(sum(own))]
        return torch.tensor(place, device=self.ids.device)

    @cached_property
    def _segment(self) -> Tensor:
        """[rows, width] 0 for tokens of prompts, 1 and on for completions, −1 for padding."""
        segment = [j for own in self._segments for j, n in enumerate(own) for _ in range(n)]
        return self._table(torch.tensor(segment, device=self.ids.device), fill=-1)

    @cached_property
    def _position(self) -> Tensor:
        """[rows, width]"""
        return self._table(self.positions[0], fill=0)

    def _table(self, values: Tensor, fill: int) -> Tensor:
        rows, width = self._sizes
        table = values.new_full((rows * width,), fill)
        table[self._place] = values
        return table.view(rows, width)

    def _padded(self, states: Tensor) -> Tensor:
        return _Pad.apply(states, self._place, *self._sizes).transpose(1, 2)  # type: ignore[no-any-return, no-untyped-call]


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
