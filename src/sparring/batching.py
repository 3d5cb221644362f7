"""How many rows go into one pass; without torch, so that a cost plan counts with the same rule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

MOST_LOGITS = 2**27
"""Logits of a forward pass that are kept for its backward pass, in float32: half a gigabyte, which is twice as many in bfloat16."""
PIECE_LOGITS = 2**25
"""Of a piece of the vocabulary's projection where they are more than that."""
MOST_SCORES = 2**26
"""Attention weights of a pass on a CPU without attention in C that are kept for its backward pass, instead of made again."""
SHORT = 128
"""Longest row of which attention takes there all queries together, in as many rows as there are."""
BLOCK, BLOCK_HALF = 128, 192
"""Queries of longer rows that attention takes together, in two bytes a number more: those are multiplied faster."""
_WASTE = 96 * 96


def most_tokens(*, cuda: bool, half: bool) -> int:
    """Tokens of a pass that keeps nothing for a backward pass, in two bytes a number (`half`) or four.

    On CPUs four times as wide ones take 1.1 to 1.6 times as long: the C library gives their large blocks back to the
    system after every product, which clears them anew.
    """
    return 2**14 if cuda else 2**12 if half else 2**11


def whole_logits(count: int, size: int) -> bool:
    """Whether so many logits of `size` bytes are kept as they are, not made in pieces."""
    return count * size <= 4 * MOST_LOGITS


def filler(count: int) -> int:
    """Tokens to add to so many, a sixteenth at most, so that few sizes occur.

    On CPUs code for a product is made anew for every size of its factors: 1 to 5 ms each, a fifth of a ragged epoch.
    """
    return -count % (1 << max(0, count.bit_length() - 5))


class Tile(NamedTuple):
    """Queries of a row that attention takes together, from `start` to `end`; their keys end with them."""

    start: int
    end: int
    prompt: int
    """Keys of the prompt that come first where some behind the prompt are left out, else 0."""
    rest: int
    """Where the other keys begin."""

    @property
    def keys(self) -> int:
        return self.prompt + self.end - self.rest


def tiles(segments: Sequence[int], *, half: bool, forward: bool) -> list[Tile]:
    """How attention takes a row of a prompt and its completions, of so many tokens each.

    A completion leaves the ones before it out, where those are more than a tile's own cost is worth; in two bytes a
    number (`half`) tiles are larger. Queries that may see keys behind them (not `forward`) stay with all of those.
    """
    prompt, at = segments[0], 0
    runs, rest = [0], prompt
    for i, size in enumerate(segments):
        if i > 1 and size * (at - rest) > _WASTE:
            runs.append(at)
            rest = at
        at += size
    found: list[Tile] = []
    for start, end in pairwise((*runs, at)):
        number = max(1, round((end - start) / (BLOCK_HALF if half else BLOCK))) if forward else 1
        size = rounded(-(-(end - start) // number), half=half)
        keys = (prompt, start) if start > prompt else (0, 0)
        found += [Tile(a, min(end, a + size), *keys) for a in range(start, end, size)]
    return found


def rounded(size: int, *, half: bool) -> int:
    """Queries or keys of a tile with its padding.

    In bfloat16 a product of new sizes costs 1 to 3 ms once, for which code is made: so there are few different sizes.
    """
    step = 32 if half else 16
    return -(-size // step) * step


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
