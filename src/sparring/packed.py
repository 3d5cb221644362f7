"""Log-probs of completions in one row without padding: a prompt is computed once for all of its completions.

Only tokens that a completion needs are computed, and the vocabulary is projected for its tokens only. Where even those
logits would not fit, they are made piece by piece and made again in the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sparring import batching
from sparring.attention import packed, unwrapped
from sparring.batching import PIECE_LOGITS as _PIECE
from sparring.chosen import chosen
from sparring.tree import Tree


def completion_logps(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    *,
    sharpen: float = 1.0,
    best: bool = False,
) -> Tensor:
    """Log-prob of every completion token, one after the other, in nats, [M]; `completions[b]` are those of `prompts[b]`.

    float32, float64 for a float64 model; gradients flow. Logits are multiplied by `sharpen` first. With `best` [M, 2]:
    beside each log-prob 1 where the token is the likeliest, else 0. Raises whatever a model raises that cannot take such
    rows: see `logps.token_logps`, which then takes the plain path.
    """
    base = unwrapped(model)
    tree = Tree(prompts, completions, next(model.parameters()).device, fill=True)
    wanted = [t for own in completions for c in own for t in c]
    more = [0] * batching.filler(len(wanted))
    tokens, keep = torch.tensor(wanted + more, device=tree.ids.device), functional.pad(tree.keep, (0, len(more)))
    with packed(model):
        decoder = base.get_decoder()
        out = decoder(
            input_ids=tree.ids,
            attention_mask=torch.ones_like(tree.ids),  # without one, transformers looks for rows in the positions
            position_ids=tree.positions,
            use_cache=False,
            layout=tree,
        )
    if not tree.asked:
        raise TypeError("its attention did not ask which tokens belong together")
    hidden = out.last_hidden_state[0].index_select(0, keep)

    def piece(hidden: Tensor, tokens: Tensor) -> Tensor:
        logits = head(base, decoder, hidden)
        logps = chosen(logits if sharpen == 1 else logits * sharpen, tokens)
        return torch.stack([logps, (logits.argmax(-1) == tokens).to(logps.dtype)], -1) if best else logps

    vocabulary = base.get_output_embeddings().weight.shape[0]
    if batching.whole_logits(len(tokens) * vocabulary, _precision(hidden).itemsize):
        return piece(hidden, tokens)[: len(wanted)]
    size = max(1, _PIECE // vocabulary)
    pieces = zip(torch.split(hidden, size), torch.split(tokens, size), strict=True)
    return torch.cat([checkpoint(piece, h, t, use_reentrant=False) for h, t in pieces])[: len(wanted)]


def _precision(hidden: Tensor) -> torch.dtype:
    """Of the logits made from hidden states here and now."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def head(base: Any, decoder: nn.Module, hidden: Tensor) -> Tensor:
    """The model's own logits [M, V] of hidden states [M, H], with whatever scaling or capping it does to them."""
    with _answering(decoder, hidden[None]):
        logits: Tensor = base(
            input_ids=torch.zeros(1, 1, dtype=torch.long, device=hidden.device), use_cache=False
        ).logits
    return logits.view(len(hidden), -1)


@contextlib.contextmanager
def _answering(decoder: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Within it the decoder gives these hidden states, whatever it is asked."""
    own = {name: value for name, value in decoder.__dict__.items() if name == "forward"}  # others wrap it so too
    decoder.__dict__["forward"] = lambda *_, **__: _Said(hidden)
    try:
        yield
    finally:
        del decoder.__dict__["forward"]
        decoder.__dict__.update(own)


class _Said:
    """A decoder's output of hidden states and nothing else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None
