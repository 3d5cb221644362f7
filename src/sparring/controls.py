"""What keeps self-play from collapsing: limits on how far a round may move, the best player, and when to stop.

In centred log-space the exact SPIN step overshoots by 1/λ (docs/theory.md); published recipes live on small rates, and
replications see later rounds make the model worse. The evidence for each control is in docs/controls.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparring.config import ControlsConfig, EvaluateConfig
from sparring.evaluate.core import is_share
from sparring.types import Frozen, Group

if TYPE_CHECKING:
    import torch
    from torch import nn

GOLD, SAMPLE = 0, 1
"""Places of the two completions in a held-out group."""


@dataclass(frozen=True)
class Limits:
    """How far a round may move from its start, on held-out prompts; None is no limit."""

    displacement: float | None
    """Largest fall of mean log p(gold) per token, in nats."""
    divergence: float | None
    """Largest KL(start ‖ learner) per token, in nats."""


@dataclass(frozen=True)
class Watch:
    """Measures a learner against its round's start (`train.Guard`)."""

    groups: Sequence[Group]
    """Held-out (gold, answer of the start at temperature 1); a prompt without gold has an empty first completion."""
    start: Sequence[Frozen]
    """The start's log-probs of them."""
    limits: Limits
    checks: int
    backoff: float
    backoffs: int
    batch_size: int
    compute: torch.dtype | None = None

    def read(self, model: nn.Module) -> dict[str, float]:
        """`held_displacement` and `held_kl`, in nats per token."""
        from sparring.logps import score

        prompts = [g.prompt for g in self.groups for _ in g.completions]
        completions = [c for g in self.groups for c in g.completions]
        lines = score(model, prompts, completions, batch_size=self.batch_size, compute=self.compute)
        before = [line for row in self.start for line in row.logps]
        gold = [(new, old) for i, (new, old) in enumerate(zip(lines, before, strict=True)) if i % 2 == GOLD]
        played = [(new, old) for i, (new, old) in enumerate(zip(lines, before, strict=True)) if i % 2 == SAMPLE]
        return {"held_displacement": displacement(gold), "held_kl": divergence(played)}

    def crossed(self, reading: Mapping[str, float]) -> str | None:
        """Which limit a reading lies beyond, in words."""
        fall, kl = -reading["held_displacement"], reading["held_kl"]
        for limit, value, what in (
            (self.limits.displacement, fall, "held-out log p(gold) fell by"),
            (self.limits.divergence, kl, "KL(start ‖ learner) on held-out answers is"),
        ):
            # A learner that is not a number any more is beyond every limit
            if limit is not None and not value <= limit:
                return f"{what} {value:.3f} nats per token, beyond {limit:.3f}"
        return None


def displacement(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Mean per token of log p_θ − log p_start over gold answers, in nats; 0 without any token."""
    differences = [a - b for new, old in pairs for a, b in zip(new, old, strict=True)]
    return math.fsum(differences) / max(1, len(differences))


def divergence(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """KL(start ‖ learner) per token from the start's own temperature-1 answers, in nats.

    The estimator is the mean of exp(d) − 1 − d with d = log p_θ − log p_start: unbiased, and never below 0 (Schulman
    2020, "Approximating KL divergence", k3).
    """
    differences = [min(a - b, 700.0) for new, old in pairs for a, b in zip(new, old, strict=True)]
    return math.fsum(math.expm1(d) - d for d in differences) / max(1, len(differences))


def limits(settings: ControlsConfig, counts: Mapping[str, float]) -> Limits:
    """The round's limits: what the settings allow, beyond what its opponent's temperature aims at.

    An opponent at temperature τ > 1 pulls the learner towards the start decoded at 1/τ (docs/theory.md), which lowers
    log p(gold) on noisy data by construction. `counts` has that cost as measured by the `held` stage.
    """
    return Limits(
        None if settings.displacement is None else settings.displacement + max(0.0, -counts["hot_displacement"]),
        None if settings.trust_region is None else settings.trust_region + counts["hot_kl"],
    )


def figure(settings: EvaluateConfig) -> str:
    """What `best` is chosen by, with `auto` resolved: sampled accuracy where there is a verifier, else `last`."""
    if settings.best != "auto":
        return settings.best
    return "sampled" if settings.verifier and settings.samples else "last"


def best_player(
    evaluations: Mapping[int, Mapping[str, Any] | None],
    settings: EvaluateConfig,
    ended: Mapping[int, bool],
    unmoved: Collection[int] = (),
) -> int:
    """The number of the best player. `ended` says of which players a guard ended the training early.

    Within one standard error the later player wins, but for one of those `unmoved`, which are an earlier one of them again.
    Without a figure it is the last player that no guard stopped.
    """
    name = figure(settings)
    if name != "last":
        scored = {n: (e or {}).get(name) for n, e in evaluations.items() if n not in unmoved}
        known = {n: (v["mean"], v["se"]) for n, v in scored.items() if v and v.get("mean") is not None}
        if known:
            return best_of(known, lower_wins=not is_share(name))
    free = [n for n in evaluations if not ended.get(n)]
    return max(free) if free else min(evaluations)


def best_of(scores: Mapping[int, tuple[float, float | None]], *, lower_wins: bool = False) -> int:
    """The last player within one standard error (None, of a single prompt: 0) of the top mean. DESIGN §7 (keep-best)."""
    sign = -1 if lower_wins else 1
    mean, error = max(((sign * m, e or 0.0) for m, e in scores.values()), key=lambda pair: pair[0])
    return max(n for n, (m, _) in scores.items() if sign * m >= mean - error)


def stop_reason(
    evaluations: Mapping[int, Mapping[str, Any] | None],
    evaluate: EvaluateConfig,
    ended: Mapping[int, bool],
    patience: int | None,
    unmoved: Collection[int] = (),
) -> str | None:
    """Why self-play should not go on after the last of these players; None where it should."""
    if patience is None or not evaluations:
        return None
    last, best = max(evaluations), best_player(evaluations, evaluate, ended, unmoved)
    rounds = "round" if patience == 1 else f"{patience} rounds"
    if last - best >= patience and figure(evaluate) == "last":
        return f"a guard ended each of the last {rounds} early (controls.patience)"
    if last - best >= patience:
        return f"no player after {best} was better by {figure(evaluate)}: the last {rounds} did not help (controls.patience)"
    return None
