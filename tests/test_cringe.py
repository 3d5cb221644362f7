"""Cringe and Pairwise Cringe against vectors.md §4, autograd and hand values; their groups by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sparring import api, methods
from sparring.errors import InputError
from sparring.losses.cringe import Contrast, contrast, draws
from sparring.types import Batch, Finish, Group, LogProbs, Played, Rendered, Sample, Score

LOGITS = [2.0, 1.0, 0.0, -1.0]
"""The one position of vectors.md §4."""


def batch_of(
    logits: Sequence[Sequence[Sequence[Sequence[float]]]],
    tokens: Sequence[Sequence[Sequence[int]]],
    targets: Sequence[Sequence[float]],
    *,
    keys: Sequence[int] = (7, 8, 9),
    pad: int = 0,
) -> tuple[Tensor, LogProbs, Batch]:
    """Leaf of logits [B, G, T, V], the log-probs of the tokens that it gives, and their batch; `pad` more positions."""
    size_T = max(len(row) for group in tokens for row in group) + pad
    padded = torch.tensor([[[*row, *[0] * (size_T - len(row))] for row in group] for group in tokens])
    mask = torch.tensor([[[i < len(row) for i in range(size_T)] for row in group] for group in tokens])
    leaf = torch.zeros(*padded.shape, len(logits[0][0][0]), dtype=torch.float64)
    for b, group in enumerate(logits):
        for g, rows in enumerate(group):
            for t in range(len(tokens[b][g])):
                leaf[b, g, t] = torch.tensor(rows[t], dtype=torch.float64)
    leaf.requires_grad_()
    logps = leaf.log_softmax(-1).gather(-1, padded[..., None]).squeeze(-1).masked_fill(~mask, 0.0)
    batch = Batch(
        padded, mask, torch.tensor(targets), torch.ones(len(tokens)), {}, tuple(keys[: len(tokens)]),
        token_weight_BGT=mask.double(),
    )  # fmt: skip
    return leaf, LogProbs(logps, mask.double(), leaf), batch


def loss_of(name: str, hyper: Mapping[str, object], policy: LogProbs, batch: Batch) -> Tensor:
    loss_B = methods.make(name, hyper).loss(policy, batch)
    assert loss_B.shape == batch.weight_B.shape and loss_B.dtype == torch.float64
    return loss_B


def slopes(loss_B: Tensor, leaf: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(loss_B.sum(), leaf, retain_graph=True)
    return slope


def golden(*, flip: bool = False, **options: object) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the golden pair: winner id 0, loser id 1, one token each, the same logits."""
    tokens, targets = ([[1], [0]], [0.0, 1.0]) if flip else ([[0], [1]], [1.0, 0.0])
    leaf, policy, batch = batch_of([[[LOGITS], [LOGITS]]], [tokens], [targets])
    hyper = {"k": 1, "tau": 1.0, **options}
    loss_B = loss_of("pairwise_cringe", hyper, policy, batch)
    slope = slopes(loss_B, leaf)[0, :, 0]
    return loss_B, slope.flip(0) if flip else slope


# --- the contrast


@pytest.mark.parametrize(
    ("token", "k", "expected"),
    [(0, 1, 1.313262), (1, 1, 0.313262), (2, 1, 0.126928), (3, 1, 0.048587), (0, 2, 1.532090)],
)
def test_expected_contrast(token: int, k: int, expected: float) -> None:
    """vectors.md §4, Cringe: k = 1, and the mean of k = 2."""
    value = contrast(torch.tensor([LOGITS]), torch.tensor([token]), torch.zeros(1), Contrast(k, True, False))
    assert value.item() == pytest.approx(expected, abs=5.1e-7)


@pytest.mark.parametrize(
    ("token", "draw", "expected"),
    [
        *((0, 0.0, 1.313262), (0, 0.7310, 1.313262), (0, 0.7311, 2.126928), (0, 0.99999, 2.126928)),
        *((3, 0.73, 0.048587), (3, 0.74, 0.126928)),
        (0, 1.0, 2.126928),
    ],
)
def test_drawn_contrast(token: int, draw: float, expected: float) -> None:
    """vectors.md §4, k = 2: the likelier of the two with probability .731059; a draw not below the law's rounded end."""
    value = contrast(torch.tensor([LOGITS]), torch.tensor([token]), torch.tensor([draw]), Contrast(2, False, False))
    assert value.item() == pytest.approx(expected, abs=5.1e-7)


def test_contrast_is_shift_but_not_scale_invariant() -> None:
    """preference.md §6.1: raw logits."""
    how, token, draw = Contrast(2, True, False), torch.tensor([0]), torch.zeros(1)
    logits = torch.tensor([LOGITS])
    assert contrast(logits + 5, token, draw, how).item() == pytest.approx(contrast(logits, token, draw, how).item())
    assert contrast(logits * 2, token, draw, how).item() > 1.7


def test_more_positives_than_tokens_are_all_the_others() -> None:
    value = contrast(torch.tensor([LOGITS]), torch.tensor([0]), torch.zeros(1), Contrast(99, True, False))
    law = [math.exp(s) / sum(map(math.exp, LOGITS[1:])) for s in LOGITS[1:]]
    assert value.item() == pytest.approx(
        sum(p * math.log1p(math.exp(2 - s)) for p, s in zip(law, LOGITS[1:], strict=True))
    )


@pytest.mark.parametrize("detach", [False, True])
def test_slope_of_the_expected_contrast(detach: bool) -> None:
    """By hand: σ(n − s⁺) on the unwanted logit, minus its share on each positive; the law itself has no gradient."""
    leaf = torch.tensor([LOGITS], dtype=torch.float64, requires_grad=True)
    slope = slopes(contrast(leaf, torch.tensor([0]), torch.zeros(1), Contrast(2, True, detach)), leaf)[0].tolist()
    one, two = 0.7310585786300049 * 0.7310585786300049, 0.2689414213699951 * 0.8807970779778823
    assert slope == pytest.approx([one + two, *([0, 0] if detach else [-one, -two]), 0])


def test_draws_follow_the_law_and_their_mean_gradient_is_the_expected_one() -> None:
    n = 20000
    leaf = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    rows, tokens = leaf.expand(n, -1), torch.zeros(n, dtype=torch.long)
    drawn = draws(torch.ones(1, 1, n, dtype=torch.bool), [3]).flatten()
    loss = contrast(rows, tokens, drawn, Contrast(2, False, False)) / n
    assert loss.sum().item() == pytest.approx(1.532090, abs=0.01)
    exact = contrast(leaf[None], tokens[:1], drawn[:1], Contrast(2, True, False))
    assert slopes(loss, leaf).tolist() == pytest.approx(slopes(exact, leaf).tolist(), abs=0.01)


def test_draws_belong_to_the_key_and_not_to_the_padding() -> None:
    mask = torch.tensor([[[True, True, False], [True, False, False]], [[True, True, True], [True, True, False]]])
    table = draws(mask, (11, 12))
    wide = draws(torch.nn.functional.pad(mask, (0, 2, 0, 1)), (11, 12))
    assert torch.equal(wide[:, :2, :3], table) and not wide[:, 2].any()
    assert torch.equal(draws(mask[1:], (12,))[0], table[1])
    assert len(set(table[mask].tolist())) == 8 and not table[~mask].any()
    assert not torch.equal(draws(mask, (13, 12))[0], table[0])


# --- Pairwise Cringe


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("detach", "winner", "loser"),
    [
        (True, [-0.095766, 0.063708, 0.023437, 0.008622], [-0.036165, 0.036165, 0, 0]),
        (False, [-0.137550, 0.091504, 0.033662, 0.012384], [-0.111723, 0.125710, -0.010226, -0.003762]),
    ],
)
def test_pairwise_golden(flip: bool, detach: bool, winner: list[float], loser: list[float]) -> None:
    """vectors.md §4, Pairwise Cringe, whole loss with both gradients; the places of the two do not matter."""
    loss_B, slope = golden(flip=flip, detach_gate=detach)
    assert loss_B.item() == pytest.approx(0.160510, abs=5.1e-7)
    assert slope[0].tolist() == pytest.approx(winner, abs=5.1e-7)
    assert slope[1].tolist() == pytest.approx(loser, abs=5.1e-7)


def test_the_gate_is_detached_by_default_and_its_constants_are_the_defaults() -> None:
    assert torch.equal(golden()[1], golden(detach_gate=True)[1])
    given = methods.signature("pairwise_cringe").parameters
    assert [given[name].default for name in ("alpha", "k", "b", "tau", "detach_gate")] == [0.5, 5, 0.0, 10.0, True]


@pytest.mark.parametrize(
    ("b", "tau", "expected"), [(0.0, 1.0, 0.017986), (10.0, 10.0, 0.645656), (-10.0, 10.0, 0.197816)]
)
def test_gate(b: float, tau: float, expected: float) -> None:
    """vectors.md §4, the gate with lp_w = −20 and lp_l = −24; flat logits give a contrast of log 2."""
    leaf = torch.zeros(1, 2, 1, 3, dtype=torch.float64)
    policy = LogProbs(torch.tensor([[[-20.0], [-24.0]]], dtype=torch.float64), torch.ones(1, 2, 1), leaf)
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    batch = Batch(torch.zeros(1, 2, 1, dtype=torch.long), mask, torch.tensor([[1.0, 0.0]]), torch.ones(1), {}, (1,))
    made = methods.make("pairwise_cringe", {"b": b, "tau": tau})
    figures = made.metrics(policy, batch)
    assert figures["gate"].item() == pytest.approx(expected, abs=5.1e-7)
    assert figures["margin"].item() == 4 and figures["accuracy"].item() == 1
    assert made.loss(policy, batch).item() == pytest.approx(expected * (20 + 0.5 * math.log(2)), rel=1e-4)


@pytest.mark.parametrize("positive", ["sample", "expect"])
def test_slopes_are_those_of_finite_differences(positive: str) -> None:
    """Several tokens, two groups, all gradients at once; the gate not detached. k = 1, so the law is no matter."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 3, 5, generator=generator, dtype=torch.float64).tolist()
    tokens, targets = [[[1, 2, 3], [4, 0]], [[2], [3, 3, 1]]], [[1.0, 0.0], [0.0, 1.0]]
    hyper = {"detach_gate": False, "k": 1, "tau": 2.0, "b": 1.0, "positive": positive, "reduction": "token"}

    def value(rows: list[list[list[list[float]]]]) -> tuple[Tensor, Tensor]:
        leaf, policy, batch = batch_of(rows, tokens, targets)
        return leaf, loss_of("pairwise_cringe", hyper, policy, batch).sum()

    leaf, loss = value(logits)
    exact = slopes(loss, leaf)
    step = 1e-6
    for b, g, t, v in ((0, 0, 1, 2), (0, 1, 0, 4), (1, 0, 0, 2), (1, 1, 2, 1), (1, 1, 1, 0)):
        sides = []
        for sign in (1, -1):
            moved = torch.tensor(logits, dtype=torch.float64)
            moved[b, g, t, v] += sign * step
            sides.append(value(moved.tolist())[1].item())
        assert exact[b, g, t, v].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=1e-7)


def test_pairwise_reduction_by_token_divides_by_both_answers_tokens() -> None:
    flat = [[0.0] * 3] * 3
    _, policy, batch = batch_of([[flat, flat[:1]]], [[[0, 1, 2], [1]]], [[1.0, 0.0]], pad=2)
    whole = loss_of("pairwise_cringe", {}, policy, batch).item()
    gate = 1 / (1 + math.exp(-2 * math.log(3) / 10))  # M = −3 log 3 + log 3
    assert whole == pytest.approx(gate * (3 * math.log(3) + 0.5 * math.log(2)))
    assert loss_of("pairwise_cringe", {"reduction": "token"}, policy, batch).item() == pytest.approx(whole / 4)


# --- Cringe


def test_cringe_of_the_golden_pair() -> None:
    """vectors.md §4: L_bin .596821 = .440190 + .5 · .313262, without a gate; by token half of it."""
    leaf, policy, batch = batch_of([[[LOGITS], [LOGITS]]], [[[0], [1]]], [[1.0, 0.0]])
    loss_B = loss_of("cringe", {"k": 1, "reduction": "sum"}, policy, batch)
    assert loss_B.item() == pytest.approx(0.596821, abs=1e-6)
    soft = torch.tensor(LOGITS, dtype=torch.float64).softmax(-1)
    slope = slopes(loss_B, leaf)[0, :, 0]
    assert slope[0].tolist() == pytest.approx((soft - torch.tensor([1.0, 0, 0, 0])).tolist(), rel=1e-6)
    assert slope[1].tolist() == pytest.approx([-0.5 * 0.2689414, 0.5 * 0.2689414, 0, 0], abs=1e-7)
    assert loss_of("cringe", {"k": 1}, policy, batch).item() == pytest.approx(0.596821 / 2, abs=1e-6)
    stopped = slopes(loss_of("cringe", {"k": 1, "detach_positive": True, "alpha": 1.0}, policy, batch), leaf)
    assert stopped[0, 1, 0].tolist() == pytest.approx([0, 0.2689414 / 2, 0, 0], abs=1e-7)


def test_cringe_of_positives_negatives_and_padding() -> None:
    """Targets 1, 0, 1 and an absent fourth completion; flat logits: log 3 per positive token, log 2 per negative."""
    flat = [[0.0] * 3] * 3
    tokens = [[[0, 1], [2, 1, 0], [1], []], [[2], [1], [], []]]
    targets = [[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    leaf, policy, batch = batch_of([[flat] * 4] * 2, tokens, targets, pad=1)
    sums = [3 * math.log(3) + 0.5 * 3 * math.log(2), math.log(3) + 0.5 * math.log(2)]
    loss_B = loss_of("cringe", {"reduction": "sum"}, policy, batch)
    assert loss_B.tolist() == pytest.approx(sums, rel=1e-6)
    mean_B = loss_of("cringe", {}, policy, batch)
    assert mean_B.tolist() == pytest.approx([sums[0] / 6, sums[1] / 2], rel=1e-6)
    assert not slopes(loss_B, leaf)[~batch.mask_BGT].any()
    figures = methods.make("cringe", {}).metrics(policy, batch)
    assert figures["logp_gold"].tolist() == pytest.approx([-2 * math.log(3), -math.log(3)])
    assert figures["logp_sample"].tolist() == pytest.approx([-2 * math.log(3), -math.log(3)])


def test_draws_do_not_depend_on_the_batch_around_a_group() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 2, 4, 9, generator=generator, dtype=torch.float64).tolist()
    tokens, targets = [[[1, 2], [3, 4]], [[5, 6, 7, 8], [1, 2, 3]]], [[1.0, 0.0]] * 2
    both = loss_of("cringe", {}, *batch_of(logits, tokens, targets)[1:])
    alone = loss_of("cringe", {}, *batch_of(logits[:1], tokens[:1], targets[:1])[1:])
    assert both[0].item() == pytest.approx(alone.item(), rel=1e-12)
    other = loss_of("cringe", {}, *batch_of(logits, tokens, targets, keys=(1, 2))[1:])
    assert (both != other).all()


# --- groups


def row(name: str, gold: tuple[int, ...] = (5, 2)) -> Rendered:
    return Rendered(name, (1, 3), gold, f"gold {name}", generated=(8, 2), generated_text="other")


def sample(name: str, index: int, tokens: tuple[int, ...], text: str = "else", finish: Finish = "stop") -> Sample:
    return Sample(name, "p" * 16, index, 0, tokens, text, finish, (0.0,) * len(tokens), "s", round=2)


SAMPLES = [
    sample("a", 0, (6, 7, 2)),
    sample("a", 1, (5, 2)),
    sample("a", 2, (9,)),
    sample("b", 0, (5, 2)),
    sample("b", 1, ()),
    sample("c", 0, (4, 2)),
    sample("d", 0, (6, 6), "gold d"),
]
ROWS = [row("a"), row("b"), row("c", ()), row("d", (5, 5, 2))]


def test_cringe_groups() -> None:
    made = methods.make("cringe", {"reduction": "sum"}).groups(Played(2, ROWS, SAMPLES))
    ids = SAMPLES[0].id, SAMPLES[2].id
    assert made.groups == [Group("a", (1, 3), ((5, 2), (6, 7, 2), (9,)), (1.0, 0.0, 0.0), 1.0, ("gold", *ids), 2)]
    assert made.dropped == {"identical": 3, "empty": 1, "no_gold": 1}
    weighed = methods.make("cringe", {}).groups(Played(2, ROWS, SAMPLES)).groups
    assert [group.weight for group in weighed] == [6.0]


def test_cringe_with_a_verifier() -> None:
    samples = [sample("a", i, (6 + i, 2)) for i in range(3)]
    scores = [Score("a", tuple(s.id for s in samples), (1.0, None, 0.0))]
    made = methods.make("cringe", {"verifier": "gsm8k"})
    paired = made.groups(Played(2, ROWS, samples, scores=scores))
    assert made.verifier == "gsm8k"
    assert paired.groups[0].completions == ((5, 2), (6, 2), (8, 2))
    assert paired.groups[0].targets == (1.0, 1.0, 0.0) and paired.dropped == {"unjudged": 1}
    assert paired.groups[0].weight == 6.0


def test_pairwise_groups_come_from_each_of_the_sources() -> None:
    plain = methods.make("pairwise_cringe", {}).groups(Played(2, ROWS, SAMPLES))
    assert [(g.completions, g.weight) for g in plain.groups] == [(((5, 2), (6, 7, 2)), 1.0), (((5, 2), (9,)), 1.0)]
    by_token = methods.make("pairwise_cringe", {"reduction": "token"}).groups(Played(2, ROWS, SAMPLES))
    assert [g.weight for g in by_token.groups] == [5.0, 3.0]
    twice = methods.make("pairwise_cringe", {"reduction": "token"}).groups(Played(2, ROWS, [*SAMPLES, *SAMPLES]))
    assert [g.weight for g in twice.groups] == [10.0, 6.0]
    data = methods.make("pairwise_cringe", {"pairs": "data"})
    assert data.plays == () and data.groups(Played(0, ROWS[:1])).groups[0].completions == ((5, 2), (8, 2))
    assert methods.make("pairwise_cringe", {"pairs": "best_worst", "scorer": "verifier:gsm8k"}).scorer


def test_pairs_by_a_verifier_take_gold_and_as_many_as_are_asked_for() -> None:
    samples = [sample("a", i, (6 + i, 2)) for i in range(3)]
    played = Played(2, ROWS[:1], samples, scores=[Score("a", tuple(s.id for s in samples), (1.0, 0.0, 0.0))])

    def winners(**hyper: object) -> list[tuple[int, ...]]:
        made = methods.make("pairwise_cringe", {"pairs": "verified", **hyper})
        assert made.verifier == "gsm8k"
        return [group.completions[0] for group in made.groups(played).groups]

    assert winners() == winners(per_prompt=10) == [(5, 2), (6, 2)]
    assert winners(per_prompt=1) == [(5, 2)]
    assert winners(with_gold=False) == [(6, 2), (6, 2)]


def test_cringe_trains_again_on_as_many_rounds_as_it_remembers() -> None:
    assert methods.make("cringe", {}).memory == () and methods.make("cringe", {"memory": 2}).memory == (1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "later"), [("cringe", {"memory": 1}), ("pairwise_cringe", {"per_prompt": 3, "with_gold": False})]
)
def test_runs_made_before_there_was_a_hyper_parameter_keep_their_keys(
    name: str, later: dict[str, object], tiny_recipe: dict[str, Any]
) -> None:
    def told(**hyper: object) -> set[str]:
        rounds = [{"method": name, **hyper}]
        trained = api.prepare(tiny_recipe | {"rounds": rounds}).plan.rounds[0].stage("player")
        return {key for key in trained.settings if key.removeprefix(f"{name}.") in later}

    assert told() == set() and told(**later) == {f"{name}.{key}" for key in later}


@pytest.mark.parametrize("name", ["cringe", "pairwise_cringe"])
def test_nobody_is_frozen_and_logits_are_asked_for(name: str) -> None:
    made = methods.make(name, {})
    assert made.frozen == () and made.needs == ("policy_logits",) and made.name == name
    assert dict(made.roles(3)) == {"opponent": 3, "start": 3} and len(made.plays) == 1
    assert made.pairing is not None and "reduction" in made.pairing


def test_pairing_does_not_change_with_the_loss() -> None:
    """A fork with another alpha, k, gate or draw keeps its groups."""
    for name, hyper in (("cringe", {"alpha": 1.0, "k": 1}), ("pairwise_cringe", {"b": 1.0, "tau": 2.0, "k": 1})):
        assert methods.make(name, hyper).pairing == methods.make(name, {}).pairing


@pytest.mark.parametrize(
    ("name", "hyper", "words"),
    [
        ("cringe", {"alpha": -1.0}, "alpha must be 0 or above"),
        ("cringe", {"k": 0}, "k counts tokens"),
        ("cringe", {"memory": -1}, "memory counts rounds"),
        ("cringe", {"positive": "best"}, "positive `best` is unknown; known are sample, expect"),
        ("cringe", {"reduction": "mean"}, "reduction `mean` is unknown; known are token, sum"),
        ("pairwise_cringe", {"tau": 0.0}, "tau above 0"),
        ("pairwise_cringe", {"alpha": -0.1}, "alpha is at least 0"),
        ("pairwise_cringe", {"pairs": "none"}, "pairs `none` is unknown"),
    ],
)
def test_refusals(name: str, hyper: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        methods.make(name, hyper)
    assert "\n" not in str(caught.value)
