"""How many rows go into one pass; without torch, so that a cost plan counts with the same rule."""

from __future__ import annotations

from collections.abc import Sequence

MOST_TOKENS = 2**14
"""Of a pass that keeps nothing for a backward pass."""
MOST_LOGITS = 2**27
"""Logits of a forward pass that are kept for its backward pass, in float32: half a gigabyte, which is twice as many in bfloat16."""
PIECE_LOGITS = 2**25
"""Of a piece of the vocabulary's projection where they are more than that."""
MOST_SCORES = 2**26
"""Attention weights of a pass on CPU that are kept for its backward pass, instead of made again."""
BLOCK = 192
"""Queries that attention takes together: fewer leave out more scores of keys behind them, and make more small products."""


def whole_logits(count: int, size: int) -> bool:
    """Whether so many logits of `size` bytes are kept as they are, not made in pieces."""
    return count * size <= 4 * MOST_LOGITS


def blocks(width: int) -> int:
    """In how many parts of nearly equal size attention takes a row of so many queries, each against keys up to its end."""
    return max(1, round(width / BLOCK))


def batches(tokens: Sequence[int], rows: Sequence[int], most_rows: int, most_tokens: int) -> list[range]:
    """Consecutive items in as few batches as have no more rows and tokens than allowed, but one item at least.

    Items count as if they were as long as the longest of their batch: that is what masks and padded rows cost.
    """
    found: list[range] = []
    first, held, longest = 0, 0, 0
    for at, (size, count) in enumerate(zip(tokens, rows, strict=True)):
        if at > first and (held + count > most_rows or (at - first + 1) * max(longest, size) > most_tokens):
            found.append(range(first, at))
            first, held, longest = at, 0, 0
        held, longest = held + count, max(longest, size)
    return [*found, range(first, len(tokens))] if tokens else found
