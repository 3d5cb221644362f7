"""What the stages of a round need, counted from lengths in tokens: matrix products, and bytes that no product moves.

Counted is what the method needs, not what we do: a prompt once for its completions, logits of completion tokens only,
keys that a query may see, no padding, no product made a second time. Norms, gates, rotations and casts of activations
cost nothing here, and float32 logits no memory, since none of these has to go by way of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

STEP = 64
"""Queries and keys of attention's products are rounded up to multiples of this, so that few sizes are to be measured."""


class Product(NamedTuple):
    """`batch` products of [rows, inner] and [inner, columns]."""

    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.rows * self.inner * self.columns


@dataclass
class Need:
    """What is to be computed and moved."""

    products: Counter[tuple[str, Product]] = field(default_factory=Counter)
    """How often each is made for `linear` layers, `attention` or `vocabulary`; of attention's, whose sizes are rounded, a
    share, so that operations stay those of the true sizes."""
    flops: float = 0
    """Operations that are counted but not measured as products: attention of single queries."""
    weights: float = 0
    """Bytes of weights that products read, once a pass."""
    moved: float = 0
    """All other bytes."""

    @property
    def operations(self) -> float:
        return self.flops + sum(product.flops * times for (_, product), times in self.products.items())

    def add(self, other: Need) -> None:
        self.products.update(other.products)
        self.flops, self.weights, self.moved = (
            self.flops + other.flops, self.weights + other.weights, self.moved + other.moved,
        )  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Of a model, and the bytes of a number in its products."""

    linear: tuple[tuple[int, int], ...]
    """Inputs and outputs of every linear layer but the vocabulary's."""
    layers: int
    heads: int
    groups: int
    """Heads of keys and values."""
    width: int
    """Of a head."""
    hidden: int
    vocabulary: int
    parameters: int
    itemsize: int

    @property
    def read(self) -> int:
        """Bytes of the weights that a pass multiplies by."""
        return self.itemsize * (sum(i * o for i, o in self.linear) + self.hidden * self.vocabulary)

    @property
    def cast(self) -> int:
        """Bytes of making the weights' casts from float32."""
        return (4 + self.itemsize) * self.parameters if self.itemsize < 4 else 0

    @property
    def token(self) -> int:
        """Bytes of a token's keys and values."""
        return 2 * self.groups * self.width * self.layers * self.itemsize


def sizes(model: Any, itemsize: int) -> Sizes:
    from torch import nn

    config = model.config
    linear = tuple((m.in_features, m.out_features) for m in model.get_decoder().modules() if isinstance(m, nn.Linear))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Sizes(
        linear, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, width,
        config.hidden_size, config.vocab_size, model.num_parameters(), itemsize,
    )  # fmt: skip


def multiplied(tokens: int, inputs: int, outputs: int, learns: bool) -> list[Product]:
    """A layer's products: forward, and for learning the gradients of its inputs and of its weights."""
    forward = Product(1, tokens, inputs, outputs)
    return [forward, Product(1, tokens, outputs, inputs), Product(1, outputs, tokens, inputs)][: 3 if learns else 1]


def layered(of: Sizes, tokens: int, logits: int, learns: bool) -> Counter[tuple[str, Product]]:
    """All layers' products for so many tokens, and the vocabulary's for so many logits."""
    found = Counter(("linear", product) for layer in of.linear for product in multiplied(tokens, *layer, learns))
    found.update(("vocabulary", product) for product in multiplied(logits, of.hidden, of.vocabulary, learns))
    return found


def seen(segments: Sequence[int]) -> list[tuple[int, int]]:
    """Of a prompt and its completions, of so many tokens each: queries, and pairs of a query and a key that it may see."""
    prompt = segments[0]
    return [(n, n * (n + 1) // 2 + (i > 0) * n * prompt) for i, n in enumerate(segments) if n]


def attended(of: Sizes, segments: Sequence[int], learns: bool) -> Counter[Product]:
    """Attention's products in one layer: two forward, four more for learning, at the mean number of keys of a query."""
    found: Counter[Product] = Counter()
    shared = of.heads // of.groups
    for queries, pairs in seen(segments):
        rows, keys = (-(-x // STEP) * STEP for x in (queries * shared, -(-pairs // queries)))
        share: Any = pairs * shared / (rows * keys)
        scores, mixed, of_keys = (Product(of.groups, *x) for x in ((rows, of.width, keys), (rows, keys, of.width), (keys, rows, of.width)))  # fmt: skip
        for product in (scores, mixed, *(scores, mixed, of_keys, of_keys)[: 4 if learns else 0]):
            found[product] += share
    return found


def passed(of: Sizes, rows: Iterable[Sequence[int]], logits: int, learns: bool = False) -> Need:
    """One pass over rows of a prompt's and its completions' tokens, with so many tokens' logits.

    Logits are read once for the softmax's sum; for learning again, and their gradient is written.
    """
    rows = list(rows)
    found = Need(layered(of, sum(map(sum, rows)), logits, learns), weights=of.read * (2 if learns else 1))
    for segments in rows:
        for product, share in attended(of, segments, learns).items():
            found.products["attention", product] += share * of.layers
    found.moved = logits * of.vocabulary * of.itemsize * (3 if learns else 1)
    return found


def completed(of: Sizes, groups: Iterable[tuple[int, Sequence[int]]], learns: bool = False) -> Need:
    """One pass over prompts with completions, of which the last tokens predict nothing and are not computed."""
    groups = list(groups)
    rows = [(prompt, *(n - 1 for n in completions)) for prompt, completions in groups]
    return passed(of, rows, sum(sum(completions) for _, completions in groups), learns)


def stepped(of: Sizes, moments: int) -> Need:
    """An optimizer step: weights, moments and gradients read and written in float32, and the weights' casts made anew."""
    return Need(moved=4 * (2 + 2 * moments + 2) * of.parameters + of.cast)


def read(of: Sizes, prompts: Sequence[int]) -> Need:
    """Prompts read: logits of their last tokens, keys and values written."""
    found = passed(of, [(n,) for n in prompts], len(prompts))
    found.moved += of.token * sum(prompts)
    return found


def decoded(of: Sizes, keys: Sequence[int]) -> Need:
    """One token more in rows that hold so many then: their keys and values are read, the new ones written."""
    found = Need(layered(of, len(keys), len(keys), learns=False), weights=of.read)
    found.flops = 4 * of.heads * of.width * of.layers * sum(keys)
    found.moved = of.token * (sum(keys) + len(keys)) + len(keys) * of.vocabulary * of.itemsize
    return found
