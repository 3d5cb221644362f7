"""What crosses a stage: frozen dataclasses, one doc line per field.

Dimension suffixes: B groups, G completions of a group, T completion tokens, V vocabulary.
Log-probs are natural logarithms (nats). Per token they are float32; sums over completion tokens are taken in float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user`, `assistant` or whatever the chat template knows."""
    content: str
    """The text of the turn."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with, where there is one, the gold answer."""

    id: str
    """Content hash of prompt and gold: stable over runs and machines."""
    messages: tuple[Message, ...]
    """The prompt: every turn before the last assistant turn."""
    gold: str | None
    """The data set's answer."""
    generated: str | None = None
    """An answer by an unknown player that came with the row (SPIN's `generated` column)."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, for verifiers."""
    source: str = ""
    """`file:line` (or `name[row]`) of the row, for error messages."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as token ids: what is played and trained on."""

    example_id: str
    prompt: tuple[int, ...]
    """Prompt token ids, generation prompt included."""
    gold: tuple[int, ...]
    """Gold completion token ids with exactly one end token, or none where the answer was cut."""
    gold_text: str
    """The gold answer as text."""
    generated: tuple[int, ...] | None = None
    """Token ids of the answer that came with the row."""
    generated_text: str | None = None
    cut: tuple[str, ...] = ()
    """What was cut to fit: any of `prompt`, `gold`, `generated`."""


@dataclass(frozen=True, slots=True)
class Player:
    """A frozen set of weights with an identity."""

    path: str
    """Folder in Hugging Face layout, or Hub id."""
    round: int | None
    """Its number: round t starts from player t and produces player t+1."""
    sha: str
    """Content hash of its weights, configuration and tokenizer."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion by one player, with the token ids that were sampled."""

    example_id: str
    player: str
    """The player's sha, or `unknown` for answers that came with the data."""
    index: int
    """0..n-1 among the samples of this prompt."""
    seed: int
    tokens: tuple[int, ...]
    """Sampled ids, the end token included where one was sampled."""
    text: str
    """The ids decoded without special tokens."""
    finish: Finish
    """`stop`: an end token was sampled. `length`: cut at the token limit, no end token."""
    logps: tuple[float, ...]
    """The player's own temperature-1 log-prob of each token, in nats, however it was sampled."""
    settings_id: str
    """Hash of how it was sampled; `off-policy` for answers that came with the data."""

    @property
    def id(self) -> str:
        return f"{self.example_id}/{self.player[:12]}/{self.index}"


@dataclass(frozen=True, slots=True)
class Group:
    """The completions of one prompt that a loss compares, with one target each; a pair is a group of two."""

    example_id: str
    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    """G token lists."""
    targets: tuple[float, ...]
    """G numbers, read by the loss: SPIN marks gold 1 and the sample 0."""
    weight: float
    """Share in the objective sum(weight * loss) / sum(weight)."""
    sources: tuple[str, ...]
    """`gold` or the id of the sample, per completion."""
    origin_round: int
    """The round whose opponent answered; lower than the current round for replayed groups."""

    @property
    def sha(self) -> str:
        """Content hash of prompt and completions: the key under which frozen log-probs are stored."""
        return hashlib.sha256(repr((self.prompt, self.completions)).encode()).hexdigest()[:24]


@dataclass(frozen=True, slots=True)
class Frozen:
    """One frozen role's log-probs of one group's completions, per token."""

    group: str
    """`Group.sha`."""
    role: str
    player: str
    """The player's sha."""
    logps: tuple[tuple[float, ...], ...]
    """G lists, aligned with the completions, float32 nats."""


@dataclass(frozen=True, slots=True)
class LogProbs:
    """Log-probs of a batch's completions under the learner or under one frozen role."""

    token_BGT: Tensor
    """Per token, 0 where there is no token."""

    @property
    def sum_BG(self) -> Tensor:
        """log p(completion | prompt): the sum over its tokens, end token included.

        In float64: near −1000 nats a float32 sum is good to 6e-5 only, more than a round's first margins.
        """
        import torch

        return self.token_BGT.sum(-1, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Batch:
    """The only tensors a loss sees beside the learner's `LogProbs`."""

    tokens_BGT: Tensor
    """Completion token ids, right-padded."""
    mask_BGT: Tensor
    """True where there is a token; made from lengths, never from pad ids."""
    targets_BG: Tensor
    weight_B: Tensor
    frozen: Mapping[str, LogProbs]
    """Role name to its log-probs."""


@dataclass(frozen=True, slots=True)
class Paired:
    """What a method's `groups` returns."""

    groups: list[Group]
    dropped: dict[str, int]
    """Number of samples that made no group, by reason."""


@dataclass(frozen=True)
class Method:
    """A record of functions that says who is frozen, what is played, how groups are made and what the loss is.

    Made by the function `method(**hyper)` of its file, whose keyword-only signature is the documented list of
    hyper-parameters.
    """

    name: str
    paper: str
    """Where it is published, with the equation numbers."""
    roles: Callable[[int], Mapping[str, int]]
    """Round t to {role: player number}; `start` (where the learner begins) is always among them."""
    groups: Callable[[Sequence[Rendered], Sequence[Sample], int], Paired]
    """Pure: rendered examples, this round's samples, round number."""
    loss: Callable[[LogProbs, Batch], Tensor]
    """Learner's log-probs and batch to one loss per group, shape [B], unreduced and unweighted."""
    metrics: Callable[[LogProbs, Batch], Mapping[str, Tensor]]
    """Like `loss`: named figures per group, shape [B], logged as weighted means."""
    plays: str | None = "opponent"
    """The role that answers; None for methods that train on gold answers alone."""
    frozen: tuple[str, ...] = ("reference",)
    """Roles whose log-probs the loss reads from `batch.frozen`."""
    memory: tuple[float, ...] = ()
    """Weights of the groups of the previous rounds, newest first: (1.0,) is the paper's 50k + 50k."""
    pairing: Mapping[str, Any] | None = None
    """The hyper-parameters that `groups` depends on; None means all of them. It decides what a fork may share."""
    status: str = "paper"
    """`paper`, `code` or `reconstruction`: where the formula was taken from."""


Verifier = Callable[[Example, str], bool | None]
"""Example and answer text to right, wrong, or None where it cannot be judged."""
