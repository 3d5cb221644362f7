"""Log-probs of completions under a causal language model, and the logits and hidden states behind them.

Two paths give the same numbers. The fast one (`packed.py`) is taken wherever it reproduces the plain one's, which is
tried once per model on a few tokens. The plain one takes any causal language model, is what the fast one is tested
against, and gives logits and hidden states too.

In the plain path rows are laid out as `[prompt completion | pad …]`: padding comes last, so that no causal or recurrent
model sees it, with or without the mask, and no row is longer than its own tokens. Logits are asked for
(`logits_to_keep`) from the last token of the shortest prompt on: the vocabulary is projected for no more prompt tokens
than prompts differ in length. Masks come from lengths, so a pad id that is also a real token does no harm.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparring import attention, batching, packed
from sparring.attention import drops, is_packed, unwrapped
from sparring.batching import batches as batches
from sparring.progress import OnRows, silent
from sparring.sharding import Sharded

log = logging.getLogger("sparring")

Prompts = Sequence[Sequence[int]]
_PACKS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a model takes the fast path, of those that were asked."""
_PLAIN = "sparring_plain"
_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_BY_LONGEST = {"dynamic", "longrope"}
"""Rotations of positions that depend on the longest row of a pass."""


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
    Completions of the same prompt that follow each other are computed with one copy of it.
    Source: SPIN §2 (log p(y|x) is the sum over tokens); vectors V5.
    """
    if sharpen <= 0:
        raise ValueError(f"sharpen is 1/temperature, above 0; not {sharpen:g}")
    if isinstance(model, Sharded):
        shards: Tensor = model(token_logps, prompts, completions, compute=compute, hide=hide, sharpen=sharpen)
        return shards
    # In training mode layers may be checkpointed: they are computed again in the backward pass, when `packed` has ended
    lasting = not (model.training and torch.is_grad_enabled()) or is_packed(model)
    if hide is None and lasting and packs_now(model):
        return packed_token_logps(model, prompts, completions, compute=compute, sharpen=sharpen)
    return plain_token_logps(model, prompts, completions, compute=compute, hide=hide, sharpen=sharpen)


def plain_token_logps(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    compute: torch.dtype | None = None,
    hide: int | None = None,
    sharpen: float = 1.0,
) -> Tensor:
    """`token_logps` by a padded row for each completion, for any causal language model: the oracle of the fast path."""
    window = _window(model, prompts, completions, compute=compute, hide=hide)
    return window.aligned(gather(window.logits, window.tokens, window.real, sharpen))


def packed_token_logps(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    compute: torch.dtype | None = None,
    sharpen: float = 1.0,
    best: bool = False,
) -> Tensor:
    """`token_logps` without padding and with one copy of each prompt, for models whose attention can be chosen.

    With `best` [N, T, 2], as `packed.completion_logps` gives it.
    """
    if not all(prompts):
        raise ValueError("a prompt needs at least one token: the first completion token is predicted from it")
    device = next(model.parameters()).device
    runs = [list(run) for _, run in groupby((i for i, c in enumerate(completions) if c), key=lambda i: prompts[i])]
    lengths = torch.tensor([[len(c)] for c in completions], device=device)
    real = torch.arange(max(1, int(lengths.max())), device=device) < lengths
    with autocast(device, compute):
        given = [prompts[run[0]] for run in runs], [[completions[i] for i in run] for run in runs]
        flat = (
            packed.completion_logps(model, *given, sharpen=sharpen, best=best)
            if runs
            else real.new_zeros((0, 2) if best else 0, dtype=torch.float32)
        )
    shape = (*real.shape, *flat.shape[1:])
    return flat.new_zeros(shape).masked_scatter(real[..., None] if best else real, flat)


def packs(model: nn.Module) -> bool:
    """Whether the fast path gives what the plain one does, tried on a few tokens when a model is first asked."""
    base = unwrapped(model)
    if getattr(base, _PLAIN, False):
        return False
    if base not in _PACKS:
        problem = _problem(base)
        if problem:
            log.info("%s: plain log-probs, slower and with the same values: %s", type(base).__name__, problem)
        _PACKS[base] = problem is None
    return _PACKS[base]


def packs_now(model: nn.Module) -> bool:
    """`packs`, but not while the model drops numbers at random, as in training mode it may."""
    return packs(model) and not (model.training and drops(model))


def use_plain(model: nn.Module) -> None:
    """Have a model and its copies take the plain path from now on."""
    setattr(unwrapped(model), _PLAIN, True)


@torch.no_grad()
def _problem(model: nn.Module) -> str | None:
    """Why a model cannot take the fast path; None where it can."""
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be chosen"
    text: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    # A few tokens would not tell: fresh weights hardly mix tokens, and rotations change in long rows only
    if other := set(getattr(text, "layer_types", None) or ()) - _LAYERS:
        return f"it has layers of kind {min(other)}"
    if rotation(text) in _BY_LONGEST:
        return f"its rotation of positions ({rotation(text)}) depends on the longest row"
    most = min(_vocabulary(model), 1000)
    ids = [(7 * i + 3) % most for i in range(24)]
    prompts, completions = [ids[:3], ids[:3], ids[3:8]], [ids[8:12], ids[12:13], ids[13:24]]
    training = model.training
    model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):  # whatever the caller computes in
            fast = packed_token_logps(model, prompts, completions)
            plain = plain_token_logps(model, prompts, completions)
    except Exception as error:  # models fail in as many ways as there are models
        return str(error).strip().split("\n")[0] or type(error).__name__
    finally:
        model.train(training)
    apart = float(((fast - plain).abs() / (1 + plain.abs())).max())
    return None if apart < 1e-4 else f"it would give log-probs that differ by {apart:.2g}"


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
    if isinstance(model, Sharded):
        # FSDP looks for tensors in what is returned, and not inside a dataclass of ours
        return Outputs(
            *model(
                lambda *given, **how: _fields(token_outputs(*given, **how)),
                prompts,
                completions,
                compute=compute,
                hide=hide,
                hidden=hidden,
            )
        )
    window = _window(model, prompts, completions, compute=compute, hide=hide, hidden=hidden)
    logits = window.logits.to(torch.promote_types(window.logits.dtype, torch.float32))
    logps = gather(logits, window.tokens, window.real)
    last = None if window.hidden is None else window.aligned(window.hidden)
    return Outputs(window.aligned(logps), window.aligned(logits), last)


def _fields(outputs: Outputs) -> tuple[Tensor, Tensor, Tensor | None]:
    return outputs.logps, outputs.logits, outputs.hidden


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
    on_rows: OnRows = silent,
) -> list[tuple[float, ...]]:
    """Frozen per-token log-probs of any number of rows, in the order given; batches are of similar length.

    A batch has at most `batch_size` rows, and fewer where they have many tokens, or many logits in the plain path.
    `hide` and `sharpen` are those of `token_logps`.
    """

    def table(prompts: Prompts, completions: Prompts) -> Tensor:
        return token_logps(model, prompts, completions, compute=compute, hide=hide, sharpen=sharpen)

    plain = hide is not None or not packs_now(model)
    most = pass_tokens(model, compute)
    rows = _scored(model, prompts, completions, table, batch_size=batch_size, most=most, plain=plain, on_rows=on_rows)
    return [tuple(row) for row in rows]


@torch.no_grad()
def score_greedy(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    batch_size: int,
    batch_tokens: int | None = None,
    compute: torch.dtype | None = None,
    on_rows: OnRows = silent,
) -> list[tuple[tuple[float, ...], tuple[bool, ...]]]:
    """What `score` gives of each row, and of each token whether it is the likeliest, so that greedy decoding takes it.

    A batch has at most `batch_size` rows and, of more than one, `batch_tokens` tokens (`pass_tokens` by default).
    """
    plain = not packs_now(model)

    def table(prompts: Prompts, completions: Prompts) -> Tensor:
        if not plain:
            return packed_token_logps(model, prompts, completions, compute=compute, best=True)
        window = _window(model, prompts, completions, compute=compute, hide=None)
        logps = gather(window.logits, window.tokens, window.real)
        best = window.logits.argmax(-1) == window.tokens
        return window.aligned(torch.stack([logps, best.to(logps.dtype)], -1))

    most = batch_tokens or pass_tokens(model, compute)
    rows = _scored(model, prompts, completions, table, batch_size=batch_size, most=most, plain=plain, on_rows=on_rows)
    return [(tuple(p for p, _ in row), tuple(best > 0 for _, best in row)) for row in rows]


def _scored(
    model: nn.Module, prompts: Prompts, completions: Prompts, table: Callable[[Prompts, Prompts], Tensor], *,
    batch_size: int, most: int, plain: bool, on_rows: OnRows,
) -> list[list[Any]]:  # fmt: skip
    """`table`'s [N, T, …] of any number of rows, each cut to its completion's length, in the order given.

    Of a model in shards every process makes its part of the same passes, and is given all rows ([N, T] only).
    """
    if plain:
        most = min(most, batching.MOST_LOGITS // _vocabulary(model))
    runs: list[list[int]] = []
    for prompt, run in groupby(range(len(prompts)), key=lambda i: prompts[i]):
        own = list(run)
        lengths = [len(completions[i]) + plain * len(prompt) for i in own]
        runs += [[own[at] for at in part] for part in batches(lengths, [1] * len(own), batch_size, most)]
    sizes = [_cost(len(prompts[run[0]]), [len(completions[i]) for i in run], plain) for run in runs]
    order = sorted(range(len(runs)), key=lambda r: (sizes[r], r))
    result: list[list[Any]] = [[] for _ in prompts]
    spans = batches([sizes[r] for r in order], [len(runs[r]) for r in order], batch_size, most)
    passes = [[i for at in span for i in runs[order[at]]] for span in spans]
    # One without any token would not go through the layers, for which processes wait for each other
    passes = [rows for rows in passes if any(completions[i] for i in rows)]
    team = model.team if isinstance(model, Sharded) else None
    # Not anew for every pass: what is made of weights once lasts as long
    with contextlib.nullcontext() if plain else attention.packed(model):
        for rows, counts in team.dealt(passes) if team else ((rows, True) for rows in passes):
            lines = table([prompts[i] for i in rows], [completions[i] for i in rows]).tolist()
            if not counts:
                continue
            for i, line in zip(rows, lines, strict=True):
                result[i] = line[: len(completions[i])]
            on_rows(len(rows), sum(len(completions[i]) for i in rows))
    return team.joined(result, [len(c) for c in completions]) if team else result


def pass_tokens(model: nn.Module, compute: torch.dtype | None) -> int:
    """Tokens of a model's forward pass of which nothing is kept."""
    weight = next(model.parameters())
    half = (compute or weight.dtype).itemsize == 2
    return batching.most_tokens(cuda=weight.is_cuda, half=half)


def _cost(prompt: int, completions: Sequence[int], plain: bool) -> int:
    """Tokens of a forward pass over one prompt's completions."""
    return len(completions) * (prompt + max(completions)) if plain else prompt + sum(completions)


def rotation(config: Any) -> str | None:
    """How a text model's configuration has positions rotated (`default`, `yarn`, …); None where it does not say."""
    found = getattr(config, "rope_parameters", None)
    return found.get("rope_type") if isinstance(found, dict) else None


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
    base = unwrapped(model)
    return _parameters(getattr(base.forward, "__func__", base.forward))


@lru_cache(maxsize=64)
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
