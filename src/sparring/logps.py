"""Log-probs of completions under a causal language model: the only module that sees logits.

Rows are laid out as `[pad … prompt | completion … pad]`: prompts end at the same column, so the logits of the
completions are one contiguous block that any Hugging Face model returns through `logits_to_keep`, and the vocabulary
is never projected for prompt tokens. Masks come from lengths, so a pad id that is also a real token does no harm.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


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
    device = next(model.parameters()).device
    before = max(len(p) for p in prompts)
    after = max(max(len(c) for c in completions), 1)
    if not all(prompts):
        raise ValueError("a prompt needs at least one token: the first completion token is predicted from it")
    rows = [
        ([0] * (before - len(p)), [*p, *c], [0] * (after - len(c))) for p, c in zip(prompts, completions, strict=True)
    ]
    ids = torch.tensor([[*left, *tokens, *right] for left, tokens, right in rows], device=device)
    mask = torch.tensor([[*left, *[1] * len(tokens), *right] for left, tokens, right in rows], device=device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    accepted = _accepts(model)
    if "position_ids" in accepted:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = after + 1
    with autocast(device, compute):
        logits = model(**inputs).logits
    logits = logits[:, -(after + 1) : -1]
    return gather(logits, ids[:, before:], mask[:, before:].bool())


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
    """Frozen per-token log-probs of any number of rows, in the order given; batches are of similar length."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]) + len(completions[i]), i))
    result: list[tuple[float, ...]] = [()] * len(order)
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size]
        table = token_logps(model, [prompts[i] for i in rows], [completions[i] for i in rows], compute=compute).tolist()
        for i, line in zip(rows, table, strict=True):
            result[i] = tuple(line[: len(completions[i])])
    return result


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
