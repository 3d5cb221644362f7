"""Log-probs of completions under a causal language model, and the logits and hidden states behind them.

Rows are laid out as `[prompt completion | pad …]`: padding comes last, so that no causal or recurrent model sees it,
with or without the mask, and no row is longer than its own tokens. Logits are asked for (`logits_to_keep`) from the
last token of the shortest prompt on: the vocabulary is projected for no more prompt tokens than prompts differ in
length. Masks come from lengths, so a pad id that is also a real token does no harm.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

_MOST_LOGITS = 2**27


@dataclass(frozen=True)
class Outputs:
    """What a model says of completions, aligned with their tokens and 0 beyond each completion's end."""

    logps: Tensor
    """[N, T] log-prob of each token, in nats."""
    logits: Tensor
    """[N, T, V] raw logits that predict each token, float32 (float64 for a float64 model)."""
    hidden: Tensor | None = None
    """[N, T, H] what the model's head made those logits from, where asked for."""


def token_logps(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    compute: torch.dtype | None = None,
    hide: int | None = None,
    sharpen: float = 1.0,
) -> Tensor:
    """Log-prob of each completion token given the prompt and the tokens before it.

    Returns [N, T], nats, float32 (float64 for a float64 model), 0 beyond each completion's end; gradients flow.
    `compute` is the autocast precision of the forward pass; the softmax is always taken in float32 or wider.
    `hide` is a token id that no other token attends to, but for a row's last one; it is scored all the same (the
    released SPIN code, vectors V12). `sharpen` multiplies the logits: log-probs of decoding at temperature 1/sharpen.
    Source: SPIN §2 (log p(y|x) is the sum over tokens); vectors V5.
    """
    if sharpen <= 0:
        raise ValueError(f"sharpen is 1/temperature, above 0; not {sharpen:g}")
    window = _window(model, prompts, completions, compute=compute, hide=hide)
    return window.aligned(gather(window.logits, window.tokens, window.real, sharpen))


def token_outputs(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    compute: torch.dtype | None = None,
    hide: int | None = None,
    hidden: bool = False,
) -> Outputs:
    """Like `token_logps`, with the logits and, for `hidden`, the last hidden states behind them; gradients flow to all.

    Raises ValueError for `hidden` where the model makes its logits without an output head.
    """
    window = _window(model, prompts, completions, compute=compute, hide=hide, hidden=hidden)
    logits = window.logits.to(torch.promote_types(window.logits.dtype, torch.float32))
    logps = gather(logits, window.tokens, window.real)
    last = None if window.hidden is None else window.aligned(window.hidden)
    return Outputs(window.aligned(logps), window.aligned(logits), last)


def gather(logits: Tensor, tokens: Tensor, mask: Tensor, sharpen: float = 1.0) -> Tensor:
    """log softmax(sharpen · logits)[token] where mask is True, else 0; [..., T, V], [..., T], [..., T] to [..., T]."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sharpen != 1:
        wide = wide * sharpen
    chosen = wide.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(-1)
    return chosen.masked_fill(~mask, 0.0)


@dataclass(frozen=True)
class _Window:
    """The part of a batch's rows that follows its shortest prompt, of W tokens, and where completions lie in it."""

    logits: Tensor
    """[N, W, V] logits that predict `tokens`."""
    tokens: Tensor
    """[N, W]"""
    real: Tensor
    """[N, W] False on padding."""
    column: Tensor
    """[N, T] where each completion's tokens are."""
    beyond: Tensor
    """[N, T] True where a completion has no token."""
    hidden: Tensor | None
    """[N, W, H]"""

    def aligned(self, values: Tensor) -> Tensor:
        """[N, W, …] to [N, T, …], 0 beyond each completion's end."""
        column, beyond = self.column, self.beyond
        for size in values.shape[2:]:
            column, beyond = column.unsqueeze(-1).expand(*column.shape, size), beyond.unsqueeze(-1)
        return values.gather(1, column).masked_fill(beyond, 0.0)


def _window(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    compute: torch.dtype | None,
    hide: int | None,
    hidden: bool = False,
) -> _Window:
    if not all(prompts):
        raise ValueError("a prompt needs at least one token: the first completion token is predicted from it")
    device = next(model.parameters()).device
    rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    shortest = min(map(len, prompts))
    after = max(max(map(len, completions)), 1)
    width = max(shortest + 1, *map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    sizes = torch.tensor([[len(row)] for row in rows], device=device)
    place = torch.arange(width, device=device)
    real = place < sizes
    seen = real if hide is None else real & ((ids != hide) | (place == sizes - 1))
    inputs: dict[str, Any] = {"input_ids": ids}
    accepted = _accepts(model)
    if "attention_mask" in accepted:
        inputs["attention_mask"] = seen.long()
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = width - shortest + 1
    kept = slice(-(width - shortest + 1), -1)
    with autocast(device, compute), _head_inputs(model, hidden) as states:
        logits = model(**inputs).logits
    starts = torch.tensor([len(p) - shortest for p in prompts], device=device)
    lengths = torch.tensor([len(c) for c in completions], device=device)
    position = torch.arange(after, device=device)
    column = (starts[:, None] + position).clamp(max=width - shortest - 1)
    last = states[0][:, kept] if hidden else None
    return _Window(logits[:, kept], ids[:, shortest:], real[:, shortest:], column, position >= lengths[:, None], last)


@contextlib.contextmanager
def _head_inputs(model: Any, wanted: bool) -> Iterator[list[Tensor]]:
    """What the output head is fed during a forward pass: unlike all layers' states, it costs no memory."""
    states: list[Tensor] = []
    if not wanted:
        yield states
        return
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    hook = head.register_forward_pre_hook(lambda _, given: states.append(given[0])) if head is not None else None
    try:
        yield states
    finally:
        if hook is not None:
            hook.remove()
    if not states:
        raise ValueError(
            f"{type(model).__name__}: no output head was used, so its last hidden states cannot be read; "
            "take a method that needs log-probs only"
        )


@torch.no_grad()
def score(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    batch_size: int,
    compute: torch.dtype | None = None,
    hide: int | None = None,
    sharpen: float = 1.0,
) -> list[tuple[float, ...]]:
    """Frozen per-token log-probs of any number of rows, in the order given; batches are of similar length.

    A batch has at most `batch_size` rows, and fewer where the logits would be over half a gigabyte in float32.
    `hide` and `sharpen` are those of `token_logps`.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]) + len(completions[i]), i))
    result: list[tuple[float, ...]] = [()] * len(order)
    sizes = [(len(prompts[i]), len(prompts[i]) + len(completions[i])) for i in order]
    for first, end in _batches(sizes, batch_size, _MOST_LOGITS // _vocabulary(model)):
        rows = order[first:end]
        given = [prompts[i] for i in rows], [completions[i] for i in rows]
        table = token_logps(model, *given, compute=compute, hide=hide, sharpen=sharpen).tolist()
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
