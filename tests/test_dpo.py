"""DPO's variants against golden values, gradients, closed forms on a table, and pairings by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparring import methods
from sparring.errors import InputError
from sparring.losses.preference import LOSSES, Pairs, cross_entropy, less_tail, logistic
from sparring.types import Batch, LogProbs, Paired, Played, Rendered, Sample, Score

# Common inputs I (vectors.md) with the lengths of V10, and common inputs II
ONE = {
    "w": [-10.0, -50.0, -100.0, -3.0],
    "l": [-12.0, -40.0, -100.0, -80.0],
    "ref_w": [-11.0, -48.0, -100.0, -30.0],
    "ref_l": [-11.5, -45.0, -100.0, -20.0],
    "size_w": [4, 10, 20, 3],
    "size_l": [5, 8, 20, 40],
}
TWO = {"w": [-20.0], "l": [-24.0], "ref_w": [-21.0], "ref_l": [-22.0], "size_w": [10], "size_l": [16]}
AT_START = ONE | {"ref_w": ONE["w"], "ref_l": ONE["l"]}


def spread(sums: Sequence[float], sizes: Sequence[int], width: int) -> Tensor:
    """Rows of equal tokens that add up to the sums, [B, T]."""
    rows = [[total / size] * size + [0.0] * (width - size) for total, size in zip(sums, sizes, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def batch_of(
    inputs: dict[str, list[float]], *, flip: bool = False, label: float = 1.0, weights: Sequence[float] | None = None
) -> tuple[LogProbs, Batch]:
    """The pairs as a batch; `flip` puts the preferred answer second."""
    width = int(max(*inputs["size_w"], *inputs["size_l"]))
    sides = ("l", "w") if flip else ("w", "l")

    def table(prefix: str) -> Tensor:
        rows = [spread(inputs[prefix + side], [int(n) for n in inputs[f"size_{side}"]], width) for side in sides]
        return torch.stack(rows, 1)

    sizes = torch.tensor([inputs[f"size_{side}"] for side in sides]).T
    mask = torch.arange(width) < sizes[..., None]
    weight_BGT = mask.double()
    size_B = len(inputs["w"])
    targets = torch.tensor([[label, 1 - label][:: -1 if flip else 1]] * size_B, dtype=torch.float64)
    weight_B = torch.tensor(weights or [1.0] * size_B, dtype=torch.float64)
    frozen = {"reference": LogProbs(table("ref_"), weight_BGT)}
    batch = Batch(torch.zeros(mask.shape, dtype=torch.long), mask, targets, weight_B, frozen)
    return LogProbs(table("").requires_grad_(), weight_BGT), batch


def values(inputs: dict[str, list[float]], flip: bool = False, label: float = 1.0, **hyper: object) -> list[float]:
    policy, batch = batch_of(inputs, flip=flip, label=label)
    made = methods.make("dpo", hyper)
    if not made.frozen:
        batch = replace(batch, frozen={})
    found: list[float] = made.loss(policy, batch).tolist()
    return found


# --- golden values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("hyper", "expected"),
    [
        ({"loss": "logistic"}, [0.620957, 1.103186, 0.693147, 0.000167]),
        ({"loss": "hinge"}, [0.85, 1.7, 1.0, 0.0]),
        ({"loss": "nca_pair"}, [1.350825, 1.584247, 1.386294, 1.448803]),
        ({"loss": "bco_pair"}, [1.312856, 1.772216, 1.386294, 0.067519]),
        ({"loss": "apo_zero"}, [0.962523, 1.172293, 1, 0.065446]),
        ({"loss": "apo_down"}, [0.987549, 1.118354, 1, 0.937193]),
        ({"loss": "robust"}, [0.602207, 1.190686, 0.693147, -1.087333]),
        ({"loss": "exo_pair"}, [2.505517, 3.980555, 2.761231, 0.000535]),
        ({"loss": "discopop"}, [0.849338, 1.103187, 0.846574, 0.000167]),
        ({"loss": "ipo"}, [21.6225, 33.930625, 25, 30.25]),
        ({"loss": "sigmoid_norm", "beta": 0.1}, [0.675800, 0.735248, 0.693147, 0.300058]),
        ({"loss": "ipo_sum"}, [12.25, 144, 25, 6724]),
        ({"loss": "cdpo"}, [0.6359570478, 1.0331860489, 0.6931471806, 0.8701665719]),
        ({"loss": "logistic", "label_smoothing": 0.1}, [0.6359570478, 1.0331860489, 0.6931471806, 0.8701665719]),
        ({"loss": "sppo_hard"}, [498501.25, 507029, 500000, 417329]),
    ],
)
def test_common_inputs_one(hyper: dict[str, object], expected: list[float], flip: bool) -> None:
    """vectors.md V1, V2, V8, V9 and V10: TRL's and SPPO's own functions, executed; β 0.1 (sppo_hard 0.001)."""
    digits = 5.1e-11 if hyper["loss"] == "cdpo" else 5.1e-7
    assert values(ONE, flip, **hyper) == pytest.approx(expected, abs=digits, rel=1e-9)


def test_aot_in_sorted_order() -> None:
    """vectors.md V10, aot and aot_unpaired: there in the order of ranks, here in that of the pairs."""
    aot = [0.693147, 0.554355, 0.598139, 0.000476]
    by_rank = sorted(range(4), key=lambda i: ONE["w"][i] - ONE["l"][i])
    found = values(ONE, loss="aot")
    assert [found[i] for i in by_rank] == pytest.approx(aot, abs=5.1e-7)
    unpaired = [0.003023, 0.668460, 0.644397, 0.105083]
    by_rank = sorted(range(4), key=lambda i: ONE["w"][i] - ONE["ref_w"][i])
    found = values(ONE, loss="aot_unpaired")
    assert [found[i] for i in by_rank] == pytest.approx(unpaired, abs=5.1e-7)


def test_aot_keeps_a_loss_with_its_pair() -> None:
    """Reordering the batch reorders the losses, so that weights stay with their pairs; smoothing mixes both signs."""
    order = [2, 0, 3, 1]
    moved = {name: [column[i] for i in order] for name, column in ONE.items()}
    for loss in ("aot", "aot_unpaired"):
        plain, there = values(ONE, loss=loss), values(moved, loss=loss)
        assert there == pytest.approx([plain[i] for i in order], rel=1e-12)
        turned = [x - t for x, t in zip(values(ONE, loss=loss, label_smoothing=0.4), plain, strict=True)]
        # −log σ(−t) = −log σ(t) + t: smoothing ε adds ε·t, and t = log(1/(e^ℓ − 1))
        assert turned == pytest.approx([-0.4 * math.log(math.expm1(x)) for x in plain], rel=1e-9)


@pytest.mark.parametrize(
    ("hyper", "expected"),
    [
        ({"loss": "logistic"}, 0.554355),
        ({"loss": "cdpo"}, 0.584355),
        ({"loss": "robust"}, 0.516855),
        ({"loss": "ipo_sum"}, 4.0),
        ({"loss": "ipo"}, 22.800625),
        ({"loss": "hinge"}, 0.7),
        ({"loss": "irpo"}, 2.554355),
        ({"loss": "logistic", "nll": 1.0}, 2.554355),
        ({"loss": "irpo", "nll": 0.25}, 0.554355 + 0.5),
        ({"loss": "dpop"}, 0.341154),
        ({"loss": "simpo"}, 1.701413),
        ({"loss": "orpo"}, 2.104206),
        ({"loss": "orpo", "nll": 0.0, "beta": 1.0}, 1.04206),
        ({"loss": "sigmoid_norm"}, 0.281150),
        ({"loss": "slic", "nll": 0.0, "gamma": 6.0}, 2.0),  # by hand: 6 − (−20 + 24)
        ({"loss": "slic", "gamma": 6.0, "beta": 0.5}, 4.2),  # 6 − 0.5 · 4 + 0.1 · 20 / 10
        ({"loss": "slic"}, 0.2),  # the margin is kept: 0.1 · 20 / 10
    ],
)
def test_common_inputs_two(hyper: dict[str, object], expected: float) -> None:
    """vectors.md §4, common inputs II, with the defaults of each loss."""
    digits = 5.1e-6 if expected == 1.04206 else 5.1e-7
    assert values(TWO, **hyper) == pytest.approx([expected], abs=digits)


def test_dpop_punishes_a_preferred_answer_below_its_reference() -> None:
    """vectors.md §4: u = −2, Δ = 0 gives 30."""
    fallen = TWO | {"w": [-23.0], "l": [-24.0], "ref_l": [-22.0]}
    assert values(fallen, loss="dpop") == pytest.approx([30.0], abs=1e-9)
    assert values(fallen, loss="dpop", penalty=0.0, beta=0.1) == pytest.approx([math.log(2)])


def test_sppo_hard_is_twice_the_released_sppo() -> None:
    """vectors.md V9: the official loss with p_win = 1, p_lose = 0."""
    official = [249250.625, 253514.5, 250000, 208664.5]
    assert values(ONE, loss="sppo_hard") == pytest.approx([2 * x for x in official], rel=1e-12)


@pytest.mark.parametrize(
    ("hyper", "expected"),
    [
        ({"loss": "logistic"}, math.log(2)),
        ({"loss": "cdpo"}, math.log(2)),
        ({"loss": "robust"}, math.log(2)),
        ({"loss": "sigmoid_norm"}, math.log(2)),
        ({"loss": "hinge"}, 1.0),
        ({"loss": "ipo"}, 25.0),
        ({"loss": "ipo_sum"}, 25.0),
        ({"loss": "sppo_hard"}, 5e5),
        ({"loss": "nca_pair"}, 2 * math.log(2)),
        ({"loss": "bco_pair"}, 2 * math.log(2)),
        ({"loss": "apo_zero"}, 1.0),
        ({"loss": "apo_down"}, 1.0),
        ({"loss": "exo_pair"}, 2.761231),
        ({"loss": "discopop"}, 0.846574),
        ({"loss": "dpop"}, math.log(2)),
        ({"loss": "aot"}, math.log(2)),
    ],
)
def test_values_where_a_round_starts(hyper: dict[str, object], expected: float) -> None:
    """vectors.md §7: policy = reference."""
    assert values(AT_START, **hyper) == pytest.approx([expected] * 4, abs=5.1e-7)


# --- labels, lengths, extremes ---------------------------------------------------------------------------------------


def test_soft_labels() -> None:
    """The swap test of vectors.md §4: exchanging the answers is q ↔ 1 − q; and q = 1 − ε is cDPO."""
    for label in (0.9, 0.6, 0.5):
        assert values(TWO, label=label) == pytest.approx(values(TWO, flip=True, label=label), rel=1e-12)
        assert values(TWO, label=label) == pytest.approx([0.554355 + (1 - label) * 0.3], abs=5.1e-7)
    assert values(TWO, label=0.9) == pytest.approx(values(TWO, loss="cdpo"), rel=1e-12)
    # A label of 0.9 that is turned round one time in ten holds with 0.9² + 0.1² = 0.82
    both = values(TWO, label=0.9, label_smoothing=0.1)
    assert both == pytest.approx(values(TWO, label=0.82), rel=1e-12)
    margin = torch.tensor([3.0, -0.5], dtype=torch.float64)
    swapped = cross_entropy(-margin, 1 - 0.7)
    assert cross_entropy(margin, 0.7).tolist() == pytest.approx(swapped.tolist(), rel=1e-12)


@pytest.mark.parametrize(("loss", "margin"), [("sigmoid_norm", 5 * 0.225), ("simpo", -1.0 - 0.5)])
def test_smoothing_and_soft_labels_of_the_length_normalised(loss: str, margin: float) -> None:
    """vectors.md §4, common inputs II: −q log σ(t) − (1−q) log σ(−t) by hand."""
    for q, hyper in ((0.8, {"label_smoothing": 0.2}), (1.0, {})):
        by_hand = q * math.log1p(math.exp(-margin)) + (1 - q) * math.log1p(math.exp(margin))
        assert values(TWO, loss=loss, **hyper) == pytest.approx([by_hand], rel=1e-9)
        assert values(TWO, loss=loss, label=q) == pytest.approx([by_hand], rel=1e-9)


def test_tail_of_the_longer_answer_counts_less() -> None:
    """vectors.md V11, LD-DPO with α = 0.5; then through the loss, for policy and reference alike."""
    tokens = torch.tensor([[[-0.1, -0.2, -0.3, -0.4], [-0.5, -0.6, 0.0, 0.0]]], dtype=torch.float64)
    mask = torch.tensor([[[True] * 4, [True, True, False, False]]])
    assert less_tail(LogProbs(tokens), mask, 0.5).tolist()[0] == pytest.approx([-0.65, -1.1], rel=1e-12)
    assert less_tail(LogProbs(tokens), mask, 0.0).tolist()[0] == pytest.approx([-0.3, -1.1], rel=1e-12)
    half = LogProbs(tokens, mask * torch.tensor([1.0, 0.5, 0.5, 1.0], dtype=torch.float64))
    assert less_tail(half, mask, 0.5).tolist()[0] == pytest.approx([-0.1 - 0.1 - 0.075 - 0.2, -0.8], rel=1e-12)

    reference = torch.tensor([[[-0.3, -0.2, -0.1, -1.0], [-0.5, -0.1, 0.0, 0.0]]], dtype=torch.float64)
    weight = mask.double()
    batch = Batch(
        torch.zeros(mask.shape, dtype=torch.long), mask, torch.tensor([[1.0, 0.0]]), torch.ones(1),
        {"reference": LogProbs(reference, weight)},
    )  # fmt: skip
    # u = −0.65 + 1.05 = 0.4, v = −1.1 + 0.6 = −0.5
    expected = math.log1p(math.exp(-2 * 0.9))
    made = methods.make("dpo", {"beta": 2.0, "ld_alpha": 0.5})
    assert made.loss(LogProbs(tokens, weight), batch).tolist() == pytest.approx([expected], rel=1e-9)
    # lengths and the NLL are those of the whole answer
    made = methods.make("dpo", {"loss": "sigmoid_norm", "beta": 2.0, "ld_alpha": 0.5, "nll": 3.0})
    expected = math.log1p(math.exp(-2 * (0.4 / 4 + 0.5 / 2))) + 3 * 0.25
    assert made.loss(LogProbs(tokens, weight), batch).tolist() == pytest.approx([expected], rel=1e-9)


def test_masked_tokens_count_in_no_sum_mean_or_length() -> None:
    policy, batch = batch_of(TWO)
    half = torch.ones_like(policy.token_BGT)
    half[:, :, ::2] = 0  # 5 of 10 and 8 of 16 tokens: sums halve, means stay
    weight = half * batch.mask_BGT
    policy = replace(policy, weight_BGT=weight)
    batch = replace(batch, frozen={"reference": replace(batch.frozen["reference"], weight_BGT=weight)})

    def one(**hyper: object) -> float:
        return methods.make("dpo", hyper).loss(policy, batch).item()

    assert one(beta=0.2) == pytest.approx(0.554355, abs=5.1e-7)
    assert one(loss="sigmoid_norm") == pytest.approx(0.281150, abs=5.1e-7)
    assert one(loss="irpo", beta=0.2) == pytest.approx(2.554355, abs=5.1e-7)


def test_extremes_stay_finite() -> None:
    sure = {"w": [0.0], "l": [-1e4], "ref_w": [-1e4], "ref_l": [0.0], "size_w": [1], "size_l": [1]}
    turned = {**sure, "w": sure["l"], "l": sure["w"], "ref_w": sure["ref_l"], "ref_l": sure["ref_w"]}
    for loss, kind in LOSSES.items():
        for inputs in (sure, turned):
            policy, batch = batch_of(inputs)
            batch = batch if kind.reference else replace(batch, frozen={})
            value = methods.make("dpo", {"loss": loss}).loss(policy, batch)
            if loss == "discopop" and inputs is turned:
                # (1−m)·logistic(x) with x = −2000, m = 0
                assert value.item() == pytest.approx(2000.0)
            value.sum().backward()
            assert torch.isfinite(value).all() and torch.isfinite(policy.token_BGT.grad).all(), loss


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss: str) -> None:
    """Autograd against finite differences: nothing is detached, and the reference gets no gradient it should not."""
    torch.manual_seed(0)
    kind = LOSSES[loss]
    made = methods.make("dpo", {"loss": loss, "nll": 0.3, "beta": 0.4})
    weight = torch.ones(3, 2, 4, dtype=torch.float64)
    weight[1, 0, 2:] = 0
    frozen = {"reference": LogProbs(-torch.rand(3, 2, 4, dtype=torch.float64) * weight, weight)}
    targets = torch.tensor([[1.0, 0.0]] * 3)
    batch = Batch(torch.zeros(3, 2, 4, dtype=torch.long), weight > 0, targets, torch.ones(3), frozen)
    batch = batch if kind.reference else replace(batch, frozen={})
    tokens = (-torch.rand(3, 2, 4, dtype=torch.float64) * weight).requires_grad_()

    def run(tokens: Tensor) -> Tensor:
        return made.loss(LogProbs(tokens, weight), batch)

    assert torch.autograd.gradcheck(run, (tokens,))


def test_metrics_are_those_of_every_pairwise_method() -> None:
    policy, batch = batch_of(ONE)
    found = methods.make("dpo", {"beta": 0.1}).metrics(policy, batch)
    assert found["margin"].tolist() == pytest.approx([0.15, -0.7, 0, 8.7])
    assert found["logp_gold"].tolist() == pytest.approx(ONE["w"])
    free = methods.make("dpo", {"loss": "simpo"}).metrics(policy, replace(batch, frozen={}))
    assert free["margin"].tolist() == pytest.approx([4, -20, 0, 154])


# --- closed forms ----------------------------------------------------------------------------------------------------

P_0 = [0.05, 0.10, 0.15, 0.20, 0.25, 0.25]
P_BASE = torch.tensor([0.10, 0.15, 0.20, 0.25, 0.20, 0.10], dtype=torch.float64)
REWARD = torch.tensor([1, 0.5, 0, -0.5, -1, -1.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("hyper", "soft", "expected"),
    [
        (
            {"loss": "logistic"},
            True,
            [0.502430097643, 0.277250555323, 0.135993039142, 0.062536304054, 0.018404656471, 0.003385347369],
        ),
        (
            {"loss": "ipo_sum"},
            False,
            [0.156077994990, 0.200059206210, 0.220499821917, 0.222602995359, 0.142811861183, 0.057948120342],
        ),
    ],
)
def test_optimum_on_the_table(hyper: dict[str, object], soft: bool, expected: list[float]) -> None:
    """vectors.md §8.6: p_base exp(r/β) for DPO with Bradley-Terry labels, p_base exp(P(y > p_0)/τ) for IPO; β = τ = ½.

    DPO's labels are soft targets of evenly drawn pairs; IPO's pairs are drawn from p_0 and ordered by P.
    """
    made = methods.make("dpo", {"beta": 0.5, **hyper})
    order = [(i, j) for i in range(6) for j in range(6) if i != j]
    wins = torch.sigmoid(REWARD[:, None] - REWARD[None, :])
    if soft:
        order = [(i, j) for i, j in order if i < j]
        targets = torch.stack([torch.stack([wins[i, j], wins[j, i]]) for i, j in order])
        weights = torch.ones(len(order), dtype=torch.float64)
    else:
        targets = torch.tensor([[1.0, 0.0]] * len(order))
        weights = torch.stack([P_0[i] * P_0[j] * wins[i, j] for i, j in order])
    index = torch.tensor(order)
    ones = torch.ones(*index.shape, 1, dtype=torch.float64)
    frozen = {"reference": LogProbs(P_BASE.log()[index][..., None], ones)}
    batch = Batch(index[..., None], ones > 0, targets, weights, frozen)
    logits = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [logits], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=0
    )

    def closure() -> Tensor:
        search.zero_grad()
        policy = LogProbs(torch.log_softmax(logits, -1)[index][..., None], ones)
        value = (weights * made.loss(policy, batch)).sum() / weights.sum()
        value.backward()
        return value

    search.step(closure)
    assert torch.softmax(logits, -1).tolist() == pytest.approx(expected, abs=1e-8)


# --- pairs -----------------------------------------------------------------------------------------------------------

END = 9


def row(
    name: str, gold: tuple[int, ...] = (1, END), generated: tuple[int, ...] | None = None, **extra: object
) -> Rendered:
    return Rendered(name, (7, ord(name)), gold, f"gold {name}", generated, None, **extra)  # type: ignore[arg-type]


def sample(name: str, index: int, tokens: tuple[int, ...], text: str = "", finish: str = "stop") -> Sample:
    text = text or f"{name}{tokens}"
    return Sample(name, "p" * 40, index, 0, tokens, text, finish, (-1.0,) * len(tokens), "s")  # type: ignore[arg-type]


def score(samples: Sequence[Sample], **judged: object) -> Score:
    return Score(samples[0].example_id, tuple(s.id for s in samples), **judged)  # type: ignore[arg-type]


def paired(played: Played, **hyper: object) -> Paired:
    return methods.make("dpo", hyper).groups(played)


def short(made: Paired) -> list[tuple[int, int, float]]:
    """First tokens of winner and loser, and the weight."""
    return [(g.completions[0][0], g.completions[1][0], g.weight) for g in made.groups]


def test_pairs_of_preference_data() -> None:
    rows = [row("a", (1, END), (2, END)), row("b", (1, END), (1, END)), row("c", (1, END)), row("d", (), (2, END))]
    made = paired(Played(3, rows))
    (group,) = made.groups
    assert (group.completions, group.targets, group.sources) == (
        ((1, END), (2, END)),
        (1.0, 0.0),
        ("gold", "generated"),
    )
    assert (group.example_id, group.prompt, group.weight, group.origin_round) == ("a", (7, 97), 1.0, 3)
    assert made.dropped == {"identical": 1, "no_pair": 2}


def test_pairs_against_own_samples_are_spins() -> None:
    samples = [sample("a", i, (5, END)) for i in range(2)]
    played = Played(1, [row("a")], samples)
    assert paired(played, pairs="gold") == methods.make("spin", {}).groups(played)
    assert short(paired(played, pairs="gold")) == [(1, 5, 2.0)]
    assert short(paired(played, pairs="gold", duplicates="drop")) == [(1, 5, 1.0)]


def verdicts() -> Played:
    """Prompt a: right 2, 3; wrong 4, 5, 4 again; one cut, one that nobody can judge, one the gold answer called wrong."""
    tokens = [(2, END), (4, END), (5, END), (3, END), (4, END), (6,), (7, END), (1, END)]
    samples = [sample("a", i, t, finish="length" if t == (6,) else "stop") for i, t in enumerate(tokens)]
    others = [sample("b", 0, (2, END)), sample("c", 0, (4, END)), sample("c", 1, (5, END))]
    scores = [
        score(samples, values=(1.0, 0.0, 0.0, 1.0, 0.0, 0.0, None, 0.0)),
        score(others[:1], values=(1.0,)),
        score(others[1:], values=(0.0, 0.0)),
    ]
    return Played(2, [row("a"), row("b"), row("c", ())], [*samples, *others], scores=scores)


def test_verified_pairs_walk_both_lists_and_wrap() -> None:
    """preference.md §7: w = gold, 2, 3; l = 4, 5, 4; pair k is (w[k mod 3], l[k mod 3]); equal pairs add up."""
    made = paired(verdicts(), pairs="verified", per_prompt=5)
    assert short(made) == [(1, 4, 2.0), (2, 5, 2.0), (3, 4, 1.0)]
    assert made.dropped == {"identical": 1, "unjudged": 1, "unfinished": 1, "all_right": 1, "all_wrong": 2}
    assert made.groups[0].sources == ("gold", "a/pppppppppppp/0.1")
    assert {g.targets for g in made.groups} == {(1.0, 0.0)}
    few = paired(verdicts(), pairs="verified", per_prompt=2)
    assert short(few) == [(1, 4, 1.0), (2, 5, 1.0)]
    assert few.dropped["unused"] == 2  # sample 3 and the second 4
    alone = paired(verdicts(), pairs="verified", per_prompt=3, with_gold=False)
    assert short(alone) == [(2, 4, 2.0), (3, 5, 1.0)]


def test_verified_pairs_taken_once() -> None:
    """Distinct answers: w = gold, 2, 3 and l = 4, 5; all six pairs come within lcm(3, 2) steps, then it ends."""
    made = paired(verdicts(), pairs="verified", duplicates="drop", per_prompt=50)
    assert short(made) == [(1, 4, 1.0), (2, 5, 1.0), (3, 4, 1.0), (1, 5, 1.0), (2, 4, 1.0), (3, 5, 1.0)]
    assert made.dropped["duplicate"] == 1
    assert len(paired(verdicts(), pairs="verified", duplicates="drop", per_prompt=4).groups) == 4


def test_a_cut_gold_answer_is_not_a_winner() -> None:
    played = replace(verdicts(), rows=[row("a", cut=("gold",)), row("b"), row("c")])
    made = paired(played, pairs="verified", per_prompt=1)
    assert short(made)[0] == (2, 4, 1.0)


def test_best_against_worst() -> None:
    """vectors.md V7: scores 2, .5, −1, 0, −3 give best 0, worst 4, P[0][4] = .9933071490757153."""
    s = [2, 0.5, -1, 0, -3]
    wins = tuple(tuple(1 / (1 + math.exp(b - a)) for b in s) for a in s)
    samples = [sample("a", i, (i + 1, END)) for i in range(5)]
    even = [sample("b", i, (i + 1, END)) for i in range(2)]
    same = [sample("c", i, (4, END)) for i in range(2)]
    apart = ((0.5, 0.6), (0.4, 0.5))
    scores = [score(samples, wins=wins), score(even, wins=((0.5, 0.5), (0.5, 0.5))), score(same, wins=apart)]
    played = Played(0, [row("a"), row("b"), row("c")], [*samples, *even, *same], scores=scores)
    made = paired(played, pairs="best_worst", scorer="./s.py:f")
    assert short(made) == [(1, 5, 1.0)]
    assert made.groups[0].targets == (1.0, 0.0)
    assert made.groups[0].sources == ("a/pppppppppppp/0.0", "a/pppppppppppp/0.4")
    assert made.dropped == {"between": 3, "tie": 2, "identical": 2}
    soft = paired(played, pairs="best_worst", scorer="./s.py:f", soft=True)
    assert soft.groups[0].targets == pytest.approx((0.9933071490757153, 1 - 0.9933071490757153), rel=1e-12)


def test_an_empty_answer_neither_wins_nor_loses() -> None:
    samples = [sample("a", 0, (1, END)), sample("a", 1, ()), sample("a", 2, (3, END))]
    wins = ((0.5, 0.2, 0.6), (0.8, 0.5, 0.9), (0.4, 0.1, 0.5))
    made = paired(Played(0, [row("a")], samples, scores=[score(samples, wins=wins)]), pairs="best_worst", scorer="s")
    assert short(made) == [(1, 3, 1.0)]
    assert made.dropped == {"empty": 1}


# --- the record ------------------------------------------------------------------------------------------------------


def test_who_takes_part() -> None:
    data, gold = methods.make("dpo", {}), methods.make("dpo", {"pairs": "gold"})
    assert (data.roles(2), data.plays, data.frozen) == ({"reference": 2, "start": 2}, (), ("reference",))
    assert gold.roles(2) == {"opponent": 2, "reference": 2, "start": 2}
    assert [turn.role for turn in gold.plays] == ["opponent"]
    free = methods.make("dpo", {"loss": "simpo"})
    assert (free.roles(0), free.frozen) == ({"start": 0}, ())
    verified = methods.make("dpo", {"pairs": "verified", "verifier": "./v.py:right"})
    assert (verified.verifier, verified.scorer) == ("./v.py:right", None)
    ranked = methods.make("dpo", {"pairs": "best_worst", "scorer": "verifier:gsm8k"})
    assert (ranked.verifier, ranked.scorer) == (None, "verifier:gsm8k")
    assert {name for name in LOSSES if methods.make("dpo", {"loss": name}).coupled} == {"aot", "aot_unpaired"}
    assert {name for name in LOSSES if not methods.make("dpo", {"loss": name}).frozen} == {"simpo", "orpo", "slic"}


def test_another_beta_shares_the_groups() -> None:
    one, two = methods.make("dpo", {}), methods.make("dpo", {"beta": 0.3, "loss": "ipo", "nll": 1.0})
    assert one.pairing == two.pairing
    for name, value in {"per_prompt": 3, "with_gold": False, "duplicates": "drop", "pairs": "gold"}.items():
        assert methods.make("dpo", {name: value}).pairing != one.pairing
    ranked = [methods.make("dpo", {"pairs": "best_worst", "scorer": "s", "soft": soft}) for soft in (False, True)]
    assert ranked[0].pairing != ranked[1].pairing


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"loss": "dop"}, "loss `dop` is unknown; known are logistic"),
        ({"pairs": "x"}, "pairs `x` is unknown"),
        ({"beta": 0.0}, "beta and tau are above 0"),
        ({"loss": "discopop", "tau": 0.0}, "beta and tau are above 0"),
        ({"gamma": 1.0}, "gamma: this loss has none; it has beta, label_smoothing"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing: this loss has none"),
        ({"loss": "robust", "label_smoothing": 0.5}, "below 1/2"),
        ({"loss": "exo_pair", "label_smoothing": 0.0}, "exo_pair: above 0"),
        ({"loss": "simpo", "gamma": -1.0}, "gamma and penalty are 0 or more"),
        ({"loss": "dpop", "penalty": -1.0}, "gamma and penalty are 0 or more"),
        ({"nll": -1.0}, "nll is 0 or more"),
        ({"ld_alpha": 1.5}, "ld_alpha between 0 and 1"),
        ({"loss": "orpo", "ld_alpha": 0.5}, "loss `orpo` has none"),
        ({"pairs": "best_worst"}, "scorer: pairs `best_worst` needs one"),
        ({"soft": True}, "soft: only pairs `best_worst`"),
        ({"soft": True, "pairs": "best_worst", "scorer": "s", "loss": "hinge"}, "soft: only pairs `best_worst`"),
        ({"per_prompt": 0}, "per_prompt is 1 or more"),
        ({"duplicates": "keep"}, "duplicates `keep` is unknown"),
    ],
)
def test_refused_hyper_parameters(hyper: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        methods.make("dpo", hyper)


def test_losses_are_functions_of_their_own() -> None:
    """The table may be used without a method: Pairs in, [B] out."""
    columns = [torch.tensor([x], dtype=torch.float64) for x in (-20.0, -24.0, -21.0, -22.0, 10.0, 16.0, 1.0)]
    assert logistic(Pairs(*columns)).tolist() == pytest.approx([0.554355], abs=5.1e-7)
