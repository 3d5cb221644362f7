"""Log-probs of completions under a causal language model: the only module that sees logits.

Rows are laid out as `[prompt completion | pad …]`: padding comes last, so that no causal or recurrent model sees it,
with or without the mask, and no row is longer than its own tokens. Logits are asked for (`logits_to_keep`) from the last
token of the shortest prompt on: the vocabulary is projected for no more prompt tokens than prompts differ in length.
Masks come from lengths, so a pad id that is also a real token does no harm.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

_MOST_LOGITS = 2**27


def token_logps(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    compute: torch.dtype | None = None,
) -> Tensor:
    """Log-prob of each completion token given the prompt and the tokens before it.

    Returns [N, T], nats, float32 (float64 for a float64 model), 0 beyond each completion's end; gradients flow.
    `compute` is the autocast precision of the forward pass; the softmax is always taken in float32 or wider.
    Source: SPIN §2 (log p(y|x) is the sum over tokens); vectors V5.
    """
    if not all(prompts):
        raise ValueError("a prompt needs at least one token: the first completion token is predicted from it")
    device = next(model.parameters()).device
    rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    shortest = min(map(len, prompts))
    after = max(max(map(len, completions)), 1)
    width = max(shortest + 1, *map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[*[1] * len(row), *[0] * (width - len(row))] for row in rows], device=device)
    inputs: dict[str, Any] = {"input_ids": ids}
    accepted = _accepts(model)
    if "attention_mask" in accepted:
        inputs["attention_mask"] = mask
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = width - shortest + 1
    with autocast(device, compute):
        logits = model(**inputs).logits
    every = gather(logits[:, -(width - shortest + 1) : -1], ids[:, shortest:], mask[:, shortest:].bool())
    starts = torch.tensor([len(p) - shortest for p in prompts], device=device)
    lengths = torch.tensor([len(c) for c in completions], device=device)
    position = torch.arange(after, device=device)
    column = (starts[:, None] + position).clamp(max=width - shortest - 1)
    return every.gather(1, column).masked_fill(position >= lengths[:, None], 0.0)


def gather(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """log softmax(logits)[token] where mask is True, else 0; shapes [..., T, V], [..., T], [..., T] to [..., T]."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = wide.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(-1)
    return chosen.masked_fill(~mask, 0.0)


@torch.no_grad()
def score(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    batch_size: int,
    compute: torch.dtype | None = None,
) -> list[tuple[float, ...]]:
    """Frozen per-token log-probs of any number of rows, in the order given; batches are of similar length.

    A batch has at most `batch_size` rows, and fewer where the logits would be over half a gigabyte in float32.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]) + len(completions[i]), i))
    result: list[tuple[float, ...]] = [()] * len(order)
    sizes = [(len(prompts[i]), len(prompts[i]) + len(completions[i])) for i in order]
    for first, end in _batches(sizes, batch_size, _MOST_LOGITS // _vocabulary(model)):
        rows = order[first:end]
        table = token_logps(model, [prompts[i] for i in rows], [completions[i] for i in rows], compute=compute).tolist()
        for i, line in zip(rows, table, strict=True):
            result[i] = tuple(line[: len(completions[i])])
    return result


def _batches(sizes: Sequence[tuple[int, int]], batch_size: int, most: int) -> Iterator[tuple[int, int]]:
    """First and end of each batch of rows, given as (prompt, whole) tokens in order of the latter; `most` in tokens."""
    first, shortest = 0, 0
    for at, (prompt, whole) in enumerate(sizes):
        shortest = prompt if at == first else min(shortest, prompt)
        if at > first and (at - first == batch_size or (at - first + 1) * (whole - shortest + 1) > most):
            yield first, at
            first, shortest = at, prompt
    if sizes:
        yield first, len(sizes)


def _vocabulary(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    return getattr(config.get_text_config(), "vocab_size", None) or 1 if config is not None else 1


def autocast(device: torch.device, compute: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Reduced-precision compute over unchanged weights; nothing for float32, float64 or None."""
    if compute in (torch.bfloat16, torch.float16):
        return torch.autocast(device.type, dtype=compute)
    return contextlib.nullcontext()


def _accepts(model: nn.Module) -> frozenset[str]:
    """Names of the arguments of the model's forward; an adapter's wrapper takes anything, so its base is asked."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return _parameters(getattr(base.forward, "__func__", base.forward))


@lru_cache(maxsize=64)
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
