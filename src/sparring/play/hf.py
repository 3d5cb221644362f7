"""The built-in engine: batched sampling from any Hugging Face causal LM.

An answer depends on the model, the prompt, its row key and the sampling settings, and on nothing else: not on the
other rows, not on their order, not on how often a run was resumed: randomness is a function of (row key, position), and
no row sees another. What remains is the rounding of the forward pass, which may differ between batch shapes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sparring import fused
from sparring.errors import InputError, NonFiniteError
from sparring.logps import autocast
from sparring.play import padded, slots
from sparring.play.halved import halved
from sparring.play.padded import Prompts
from sparring.progress import OnRows, silent
from sparring.types import Finish, Player, Rendered, Sample

if TYPE_CHECKING:
    from sparring.config import PlayConfig
    from sparring.play.graph import Graph
    from sparring.prompts import Renderer

Floats = np.ndarray[Any, np.dtype[np.float64]]
_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Answer:
    """What was sampled for one prompt."""

    tokens: tuple[int, ...]
    """Sampled ids, the end token included where one was sampled."""
    logps: tuple[float, ...]
    """Untempered, unfiltered log-prob of each token, float32 nats; of another engine empty where it gives none."""
    finish: Finish
    how: str = ""
    """`text`: the tokens are ours of the engine's text; `inexact`: it may have read other prompt tokens too."""


Ask = Callable[[Prompts, Sequence[int]], list[Answer]]
"""An engine: one answer per prompt and key."""


@dataclass(frozen=True)
class Mixture:
    """A second model whose logits are mixed into the player's."""

    model: Any
    share: float
    """Tokens come from softmax((1 − share) · logits + share · the second model's)."""


def key(seed: int, round: int, example_id: str, index: int) -> int:
    """64-bit key of one answer's randomness: any change of a part gives an unrelated key."""
    digest = hashlib.blake2b(repr((seed, round, example_id, index)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def settings_id(settings: PlayConfig, share: float = 0.0, engine: str = "hf") -> str:
    """Short hash of how tokens are drawn; equal for settings that draw the same tokens from the same keys."""
    parts: tuple[float, ...] = (
        float(settings.temperature),
        float(settings.top_p),
        settings.top_k,
        settings.max_new_tokens,
    )
    if share:
        parts += (share,)
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
    return digest if engine == "hf" else f"{digest}-{engine}"


def uniforms(keys: Sequence[int], positions: int) -> Floats:
    """Numbers in [0, 1) of shape [len(keys), positions]; column t is output t of SplitMix64 seeded with the key.

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"; the top 53 bits are kept.
    """
    seeds = np.array([k & 0xFFFFFFFFFFFFFFFF for k in keys], dtype=np.uint64)[:, None]
    steps = np.arange(1, positions + 1, dtype=np.uint64)[None, :]
    z = seeds + steps * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    top: Floats = (z >> np.uint64(11)).astype(np.float64)
    return top * 2.0**-53


def keep_likeliest(weights: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero all but the `top_k` largest weights [B, V], then all but the fewest that hold `top_p` of what is left.

    The order (k first, p of the remainder) is that of transformers; of equal weights at the k-th place any may stay.
    """
    vocabulary = weights.shape[-1]
    largest, ids = weights.topk(min(top_k or vocabulary, vocabulary))
    total = largest.cumsum(-1, dtype=torch.float64)
    kept = largest * (total - largest < top_p * total[:, -1:])
    return torch.zeros_like(weights).scatter(-1, ids, kept)


def invert(weights: Tensor, u: Tensor) -> Tensor:
    """The token at quantile `u` [B] of the distribution proportional to `weights` [B, V]; never one of weight 0.

    First a block of tokens is found, by sums that are as exact as the weights, then the token in it.
    """
    missing = -weights.shape[-1] % _BLOCK
    blocks = (functional.pad(weights, (0, missing)) if missing else weights).view(len(weights), -1, _BLOCK)
    block, rest = _search(blocks.sum(-1), u)
    token, _ = _search(blocks[torch.arange(len(blocks), device=blocks.device), block], rest)
    # Only weights that are not numbers get here; they are reported by log-prob, not by a crash inside the model.
    return (block * _BLOCK + token).clamp(max=weights.shape[-1] - 1)


def _search(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Where quantile `u` falls, and at which quantile of that place's own weight it does."""
    cdf = weights.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1]
    # u * total must stay below total: at total the search would run past the last place that has any weight.
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))[:, None]
    place = torch.searchsorted(cdf, target, right=True).clamp(max=weights.shape[-1] - 1)
    held = weights.gather(-1, place)
    return place[:, 0], ((target - cdf.gather(-1, place) + held) / held).clamp(min=0)[:, 0]


def draw(logits: Tensor, u: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids [B] and their temperature-1 log-probs [B] (nats) from float32 logits [B, V] and uniforms [B]."""
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()
    log_total = weights.sum(-1).log()
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        if temperature != 1:
            weights = ((logits - top) / temperature).exp_()
        if top_k or top_p < 1:
            weights = keep_likeliest(weights, top_k, top_p)
        token = invert(weights, u)
    return token, (logits.gather(-1, token[:, None]) - top).squeeze(-1) - log_total


def sample(
    model: Any, prompts: Prompts, keys: Sequence[int], *, temperature: float, top_p: float = 1.0,
    top_k: int = 0, max_new_tokens: int, stop_ids: Sequence[int], batch_size: int,
    compute: torch.dtype | None = None, mixture: Mixture | None = None, on_rows: OnRows = silent,
    graph: Graph | None = None,
) -> list[Answer]:  # fmt: skip
    """One answer per prompt, in the order given; repeat a prompt with another key for more.

    Temperature 0 is greedy. `compute` float16 or bfloat16 runs the forward pass under autocast; log-probs are
    float32 either way. `graph`, of `graph.compiled(model, compute)`, takes the model's steps. The model is put into eval
    mode and back. Raises InputError for a prompt without tokens, NonFiniteError for logits that are not finite.
    """
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {i}: it has no tokens: a player needs at least one to start from")
    if len(keys) != len(prompts):
        raise ValueError(f"{len(keys)} keys for {len(prompts)} prompts")
    if graph is not None and not graph.made_for(model, compute):
        raise ValueError("the graph is another model's, for another precision, or has ended")
    if not prompts:
        return []

    def choose(logits: list[Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
        mixed = logits[0] if mixture is None else torch.lerp(logits[0], logits[1], mixture.share)
        token, logp = draw(mixed, u, temperature=temperature, top_p=top_p, top_k=top_k)
        if mixture is None:
            return token, logp
        # The player's own log-prob, however the token came about
        return token, logits[0].log_softmax(-1).gather(-1, token[:, None]).squeeze(-1)

    # Longest first: rows that do not fit into memory fail at once, not after an hour.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    models = [model] if mixture is None else [model, mixture.model]

    def drawn(rows: Sequence[int]) -> Tensor:
        return torch.from_numpy(uniforms([keys[order[i]] for i in rows], max_new_tokens)).to(model.device)

    # Tried in full precision, before autocast
    in_slots = all(slots.decodes(m) for m in models)
    decode = partial(slots.decode, graph=graph) if in_slots else padded.decode
    theirs = fused.linears(models, compute) if in_slots else ()
    was_training = model.training
    model.eval()
    try:
        # Without inference mode, in which autocast keeps no casts of weights
        with torch.no_grad(), autocast(model.device, compute), halved(models, compute, theirs):
            longest_first = [prompts[i] for i in order]
            rows = decode(models, longest_first, drawn, max_new_tokens, stop_ids, batch_size, choose, on_rows)
    finally:
        model.train(was_training)
    answers = [
        Answer(tuple(tokens), tuple(logps), "stop" if tokens[-1] in stop_ids else "length") for tokens, logps in rows
    ]
    if not all(np.isfinite(a.logps).all() for a in answers):
        raise NonFiniteError("play: the player's logits are not finite: its weights or the precision are broken")
    return [answer for _, answer in sorted(zip(order, answers, strict=True), key=lambda pair: pair[0])]


def play(
    model: Any, rows: Sequence[Rendered], player: Player, settings: PlayConfig, renderer: Renderer, *, seed: int,
    round: int, role: str = "opponent", indices: Sequence[int] | None = None, mixture: Mixture | None = None,
    compute: torch.dtype | None = None, on_rows: OnRows = silent, graph: Graph | None = None,
) -> list[Sample]:  # fmt: skip
    """Answers of `player`, whose weights `model` holds, to every row, grouped by row in order.

    `indices` number a prompt's answers and seed them; 0 … `settings.samples` − 1 where they are not given.
    """

    def ask(prompts: Prompts, keys: Sequence[int]) -> list[Answer]:
        return sample(
            model,
            prompts,
            keys,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_new_tokens=settings.max_new_tokens,
            stop_ids=renderer.stop_ids,
            batch_size=settings.batch_size,
            compute=compute,
            mixture=mixture,
            on_rows=on_rows,
            graph=graph,
        )

    how = settings_id(settings, mixture.share if mixture else 0.0)
    numbers = range(settings.samples) if indices is None else indices
    return samples(ask, rows, player, how, renderer, seed=seed, round=round, role=role, indices=numbers)


def samples(
    ask: Ask, rows: Sequence[Rendered], player: Player, how: str, renderer: Renderer, *, seed: int, round: int,
    role: str, indices: Sequence[int],
) -> list[Sample]:  # fmt: skip
    """What an engine answers, as samples of `player`, grouped by row in order; `how`: their settings id."""
    wanted = [(row, index) for row in rows for index in indices]
    answers = ask([row.prompt for row, _ in wanted], [key(seed, round, row.example_id, index) for row, index in wanted])
    return [
        Sample(
            row.example_id,
            player.sha,
            index,
            seed,
            a.tokens,
            renderer.decode(a.tokens),
            a.finish,
            a.logps,
            f"{how}-{a.how}" if a.how else how,
            round,
            role,
        )
        for (row, index), a in zip(wanted, answers, strict=True)
    ]
