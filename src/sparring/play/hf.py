"""The built-in engine: batched sampling from any Hugging Face causal LM.

An answer depends on the model, the prompt, its row key and the sampling settings, and on nothing else: not on the
other rows of the batch, not on their order, not on how often a run was resumed. Two things give that. Randomness is
a function of (row key, position), and padding is masked out with positions counted from each prompt's first token.
What remains is the rounding of the forward pass, which may differ between batch shapes.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparring.errors import InputError, NonFiniteError
from sparring.types import Finish, Player, Rendered, Sample

if TYPE_CHECKING:
    from sparring.config import PlayConfig
    from sparring.prompts import Renderer

Prompts = Sequence[Sequence[int]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
_HALF = (torch.float16, torch.bfloat16)
_CACHED = {"attention_mask", "position_ids", "past_key_values", "use_cache"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What was sampled for one prompt."""

    tokens: tuple[int, ...]
    """Sampled ids, the end token included where one was sampled."""
    logps: tuple[float, ...]
    """Untempered, unfiltered log-prob of each token, float32 nats."""
    finish: Finish


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


def settings_id(settings: PlayConfig, share: float = 0.0) -> str:
    """Short hash of how tokens are drawn; equal for settings that draw the same tokens from the same keys."""
    parts: tuple[float, ...] = (
        float(settings.temperature),
        float(settings.top_p),
        settings.top_k,
        settings.max_new_tokens,
    )
    if share:
        parts += (share,)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


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
    """The token at quantile `u` [B] of the distribution proportional to `weights` [B, V]; never one of weight 0."""
    cdf = weights.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1]
    # u * total must stay below total: at total the search would run past the last token that has any weight.
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cdf, target[:, None], right=True).squeeze(-1)
    # Only weights that are not numbers get here; they are reported by log-prob, not by a crash inside the model.
    return token.clamp(max=weights.shape[-1] - 1)


def draw(logits: Tensor, u: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids [B] and their temperature-1 log-probs [B] (nats) from float32 logits [B, V] and uniforms [B]."""
    shifted = logits - logits.amax(-1, keepdim=True)
    weights = shifted.exp()
    log_total = weights.sum(-1).log()
    if temperature == 0:
        token = shifted.argmax(-1)
    else:
        if temperature != 1:
            weights = (shifted / temperature).exp()
        if top_k or top_p < 1:
            weights = keep_likeliest(weights, top_k, top_p)
        token = invert(weights, u)
    return token, shifted.gather(-1, token[:, None]).squeeze(-1) - log_total


class _Cached:
    """Left-padded prompts and the model's own cache: a step is a forward over one column."""

    def __init__(self, model: Any, accepted: set[str], prompts: Prompts, room: int) -> None:
        self.model, self.width = model, max(map(len, prompts))
        ids = np.zeros((len(prompts), self.width), dtype=np.int64)
        mask = np.ones((len(prompts), self.width + room), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, self.width - len(prompt) :] = prompt
            mask[row, : self.width - len(prompt)] = 0
        self.ids, self.mask = (torch.from_numpy(a).to(model.device) for a in (ids, mask))
        self.extra = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.cache: Any = None

    def start(self) -> Tensor:
        positions = (self.mask[:, : self.width].cumsum(-1) - 1).clamp(min=0)
        self.position = positions[:, -1:]
        return self._forward(self.ids, positions)

    def step(self, token: Tensor) -> Tensor:
        self.width += 1
        self.position = self.position + 1
        return self._forward(token[:, None], self.position, past_key_values=self.cache)

    def _forward(self, ids: Tensor, positions: Tensor, **past: Any) -> Tensor:
        mask = self.mask[:, : self.width]
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **past, **self.extra
        )
        self.cache = getattr(out, "past_key_values", None)  # some keep theirs to themselves
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def select(self, rows: Tensor) -> bool:
        """Keep only these rows, where the cache can do that."""
        # Layers with a recurrent state inherit a selection that moves their keys and values but not that state.
        layers = getattr(self.cache, "layers", None) or [None]
        if any(not hasattr(layer, "batch_select_indices") or hasattr(layer, "recurrent_states") for layer in layers):
            return False
        self.cache.batch_select_indices(rows)
        self.mask, self.position = self.mask[rows], self.position[rows]
        return True


class _Recomputed:
    """For models without a usable cache: right-padded rows, and every step is a forward over everything.

    Padding comes after the last token, so that a causal or recurrent model cannot see it and needs no positions.
    """

    def __init__(self, model: Any, accepted: set[str], prompts: Prompts, room: int) -> None:
        self.model, self.masked = model, "attention_mask" in accepted
        # A cache of the model's own would outlive the step
        self.extra: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        lengths = np.array([len(p) for p in prompts])
        ids = np.zeros((len(prompts), lengths.max() + room), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        self.ids, self.lengths = (torch.from_numpy(a).to(model.device) for a in (ids, lengths))
        self.width = int(lengths.max())

    def start(self) -> Tensor:
        mask = (torch.arange(self.width, device=self.ids.device) < self.lengths[:, None]).long()
        masked = {"attention_mask": mask} if self.masked else {}
        logits = self.model(input_ids=self.ids[:, : self.width], **masked, **self.extra).logits
        last: Tensor = logits[torch.arange(len(logits), device=logits.device), self.lengths - 1].float()
        return last

    def step(self, token: Tensor) -> Tensor:
        self.ids.scatter_(1, self.lengths[:, None], token[:, None])
        self.lengths = self.lengths + 1
        self.width += 1
        return self.start()

    def select(self, rows: Tensor) -> bool:
        self.ids, self.lengths = self.ids[rows], self.lengths[rows]
        self.width = int(self.lengths.max())
        return True


def _begin(model: Any, prompts: Prompts, room: int) -> tuple[_Cached | _Recomputed, Tensor]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # an adapter hides the forward
    accepted = set(inspect.signature(inner.forward).parameters)
    if accepted >= _CACHED:
        cached = _Cached(model, accepted, prompts, room)
        logits = cached.start()
        if cached.cache is not None:
            return cached, logits
    recomputed = _Recomputed(model, accepted, prompts, room)
    return recomputed, recomputed.start()


def _decode(
    model: Any, prompts: Prompts, keys: Sequence[int], stop_ids: Sequence[int], length: int,
    rule: dict[str, Any], mixture: Mixture | None,
) -> list[Answer]:  # fmt: skip
    engine, logits = _begin(model, prompts, length)
    beside, others = (None, logits) if mixture is None else _begin(mixture.model, prompts, length)
    u = torch.from_numpy(uniforms(keys, length).T.copy()).to(logits.device)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=logits.device)
    tokens = torch.zeros((length, len(prompts)), dtype=torch.long, device=logits.device)
    logps = torch.zeros((length, len(prompts)), device=logits.device)
    rows = torch.arange(len(prompts), device=logits.device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=logits.device)
    for position in range(length):
        mixed = logits if mixture is None else torch.lerp(logits, others, mixture.share)
        token, logp = draw(mixed, u[position, rows], **rule)
        if mixture is not None:  # the player's own log-prob, however the token came about
            logp = logits.log_softmax(-1).gather(-1, token[:, None]).squeeze(-1)
        tokens[position, rows], logps[position, rows] = token, logp
        done |= torch.isin(token, stops)
        finished = int(done.sum())
        if finished == len(done) or position + 1 == length:
            break
        if 2 * finished >= len(done) and beside is None:
            left = torch.nonzero(~done).squeeze(-1)
            if engine.select(left):
                rows, token, done = rows[left], token[left], done[left]
        logits = engine.step(token)
        others = logits if beside is None else beside.step(token)
    return _answers(tokens.T.cpu().numpy(), logps.T.cpu().numpy(), stop_ids)


def _answers(tokens: np.ndarray[Any, Any], logps: np.ndarray[Any, Any], stop_ids: Sequence[int]) -> list[Answer]:
    """Cut each row after its first end token: what follows was decoded while other rows were unfinished."""
    stopped = np.isin(tokens, list(stop_ids))
    answers = []
    for row, stops in enumerate(stopped):
        n = int(stops.argmax()) + 1 if stops.any() else len(stops)
        finish: Finish = "stop" if stops.any() else "length"
        answers.append(Answer(tuple(tokens[row, :n].tolist()), tuple(logps[row, :n].tolist()), finish))
    if not all(np.isfinite(a.logps).all() for a in answers):
        raise NonFiniteError("play: the player's logits are not finite: its weights or the precision are broken")
    return answers


def sample(
    model: Any, prompts: Prompts, keys: Sequence[int], *, temperature: float, top_p: float = 1.0,
    top_k: int = 0, max_new_tokens: int, stop_ids: Sequence[int], batch_size: int,
    compute: torch.dtype | None = None, mixture: Mixture | None = None,
) -> list[Answer]:  # fmt: skip
    """One answer per prompt, in the order given; repeat a prompt with another key for more.

    Temperature 0 is greedy. `compute` float16 or bfloat16 runs the forward pass under autocast; log-probs are
    float32 either way. The model is put into eval mode and back. Raises InputError for a prompt without tokens,
    NonFiniteError for logits that are not finite.
    """
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {i}: it has no tokens: a player needs at least one to start from")
    if len(keys) != len(prompts):
        raise ValueError(f"{len(keys)} keys for {len(prompts)} prompts")
    # Longest first: a batch that does not fit into memory fails at once, not after an hour.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    rule = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    answers: dict[int, Answer] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for first in range(0, len(order), batch_size):
                batch = order[first : first + batch_size]
                # A context per batch: autocast keeps the casts of weights for as long as it lives.
                with torch.autocast(model.device.type, dtype=compute, enabled=compute in _HALF):
                    chosen = [prompts[i] for i in batch], [keys[i] for i in batch]
                    decoded = _decode(model, *chosen, stop_ids, max_new_tokens, rule, mixture)
                answers.update(zip(batch, decoded, strict=True))
    finally:
        model.train(was_training)
    return [answers[i] for i in range(len(prompts))]


def play(
    model: Any, rows: Sequence[Rendered], player: Player, settings: PlayConfig, renderer: Renderer, *, seed: int,
    round: int, role: str = "opponent", indices: Sequence[int] | None = None, mixture: Mixture | None = None,
    compute: torch.dtype | None = None,
) -> list[Sample]:  # fmt: skip
    """Answers of `player`, whose weights `model` holds, to every row, grouped by row in order.

    `indices` number a prompt's answers and seed them; 0 … `settings.samples` − 1 where they are not given.
    """
    numbers = range(settings.samples) if indices is None else indices
    wanted = [(row, index) for row in rows for index in numbers]
    answers = sample(
        model,
        [row.prompt for row, _ in wanted],
        [key(seed, round, row.example_id, index) for row, index in wanted],
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=renderer.stop_ids,
        batch_size=settings.batch_size,
        compute=compute,
        mixture=mixture,
    )
    how = settings_id(settings, mixture.share if mixture else 0.0)
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
            how,
            round,
            role,
        )
        for (row, index), a in zip(wanted, answers, strict=True)
    ]
