"""SPIN's losses against the golden vectors V1-V5 (official function executed) and hand values."""

from __future__ import annotations

import math

import pytest
import torch

from sparring import losses, methods
from sparring.logps import gather
from sparring.types import Batch, LogProbs

POLICY = {"gold": [-10.0, -50.0, -100.0, -3.0], "sample": [-12.0, -40.0, -100.0, -80.0]}
REFERENCE = {"gold": [-11.0, -48.0, -100.0, -30.0], "sample": [-11.5, -45.0, -100.0, -20.0]}


def batch_of(
    policy: dict[str, list[float]], reference: dict[str, list[float]], *, flip: bool = False
) -> tuple[LogProbs, Batch]:
    """One-token completions whose log-probs are the given sums; `flip` puts the gold answer second."""
    sides = ("sample", "gold") if flip else ("gold", "sample")

    def table(values: dict[str, list[float]]) -> torch.Tensor:
        return torch.tensor([values[side] for side in sides], dtype=torch.float64).T.unsqueeze(-1)

    policy_BGT = table(policy).requires_grad_()
    size_B = len(policy["gold"])
    targets_BG = torch.tensor([[float(side == "gold") for side in sides]] * size_B)
    mask_BGT = torch.ones(policy_BGT.shape, dtype=torch.bool)
    frozen = {"reference": LogProbs(table(reference))}
    batch = Batch(torch.zeros(policy_BGT.shape, dtype=torch.long), mask_BGT, targets_BG, torch.ones(size_B), frozen)
    return LogProbs(policy_BGT), batch


def spin_losses(beta: float, loss: str = "logistic", flip: bool = False) -> tuple[torch.Tensor, LogProbs, Batch]:
    policy, batch = batch_of(POLICY, REFERENCE, flip=flip)
    method = methods.make("spin", {"beta": beta, "loss": loss})
    return method.loss(policy, batch), policy, batch


@pytest.mark.parametrize("flip", [False, True])
def test_v1_logistic(flip: bool) -> None:
    loss, policy, batch = spin_losses(0.1, flip=flip)
    expected = [0.6209570477895321, 1.103186048885458, 0.6931471805599453, 1.665719371121945e-4]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    assert loss.mean().item() == pytest.approx(0.6043642122930118, rel=1e-12)
    loss.mean().backward()
    gold = policy.token_BGT.grad[:, int(flip), 0]
    other = policy.token_BGT.grad[:, int(not flip), 0]
    slope = [-0.011564253866406263, -0.016704694304204154, -0.0125, -4.163951619433395e-06]
    assert gold.tolist() == pytest.approx(slope, rel=1e-12)
    assert other.tolist() == pytest.approx([-s for s in slope], rel=1e-12)
    metrics = methods.make("spin", {"beta": 0.1}).metrics(policy, batch)
    assert metrics["accuracy"].tolist() == [1, 0, 0, 1]  # strict: a margin of 0 is not a win
    assert (0.1 * metrics["ratio_gold"]).tolist() == pytest.approx([0.1, -0.2, 0, 2.7])
    assert (0.1 * metrics["ratio_sample"]).tolist() == pytest.approx([-0.05, 0.5, 0, -6])
    assert metrics["margin"].tolist() == pytest.approx([0.15, -0.7, 0, 8.7])
    assert metrics["logp_gold"].tolist() == POLICY["gold"]
    assert metrics["logp_sample"].tolist() == POLICY["sample"]


def test_v2_hinge() -> None:
    assert spin_losses(0.1, "hinge")[0].tolist() == pytest.approx([0.85, 1.7, 1.0, 0.0], abs=1e-12)


def test_v3_beta_5() -> None:
    expected = [5.529314753607964e-4, 35.0, 0.6931471805599453, 1.2075367922765428e-189]
    assert spin_losses(5.0)[0].tolist() == pytest.approx(expected, rel=1e-12)
    assert spin_losses(5.0, "hinge")[0].tolist() == pytest.approx([0, 36, 1, 0])


def test_v4_reference_free() -> None:
    zero = {"gold": [0.0] * 4, "sample": [0.0] * 4}
    policy, batch = batch_of(POLICY, zero)
    expected = [0.5981388693815918, 1.3132616875182228, 0.6931471805599453, 4.527246875986174e-4]
    assert methods.make("spin", {"beta": 0.1}).loss(policy, batch).tolist() == pytest.approx(expected, rel=1e-12)


def test_v5_log_prob_gather() -> None:
    logits = torch.tensor(
        [
            [[0, 1, 2], [1, 0, 0], [0, 0, 3], [5, 5, 5]],
            [[2, 0, 0], [0, 2, 0], [0, 0, 0], [1, 2, 3]],
        ],
        dtype=torch.float64,
    )
    labels = torch.tensor([[-100, -100, 2, 1], [-100, 0, 1, -100]])
    # The logit at a position predicts the next label: the last logit and the first label have no partner.
    mask = labels[:, 1:] != -100
    token_logps = gather(logits[:, :-1], labels[:, 1:].clamp(min=0), mask)
    assert token_logps.sum(-1).tolist() == pytest.approx([-4.646367670353012, -0.4790895324437694], rel=1e-12)
    average = token_logps.sum(-1) / mask.sum(-1)
    assert average.tolist() == pytest.approx([-2.323183835176506, -0.2395447662218847], rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "at_zero", "at_three"),
    [
        ("logistic", math.log(2), 0.5543552445),
        ("hinge", 1.0, 0.7),
        ("exponential", 1.0, 0.7408182207),
        ("correlation", 1.0, 0.7),
    ],
)
def test_every_convex_loss(loss: str, at_zero: float, at_three: float) -> None:
    """Vectors, section 7 (values at θ = θ_t) and common inputs III (λ d = 0.3)."""
    function = losses.CONVEX[loss]
    assert function(torch.tensor(0.0, dtype=torch.float64)).item() == pytest.approx(at_zero, rel=1e-12)
    policy, batch = batch_of({"gold": [-40.0], "sample": [-30.0]}, {"gold": [-41.0], "sample": [-28.0]})
    got = methods.make("spin", {"beta": 0.1, "loss": loss}).loss(policy, batch)
    assert got.item() == pytest.approx(at_three, abs=5e-11)


def test_logistic_does_not_overflow() -> None:
    margins = torch.tensor([-1e4, 1e4])
    assert losses.logistic(margins).tolist() == [1e4, 0.0]


def test_sums_keep_small_differences_of_long_answers() -> None:
    """Near −1000 nats a float32 sum would lose a difference of 1e-5."""
    base = torch.full((1, 1, 1000), -1.0)
    moved = base.clone()
    moved[0, 0, 0] += 1e-5
    difference = LogProbs(moved).sum_BG - LogProbs(base).sum_BG
    assert difference.item() == pytest.approx(1e-5, rel=2e-2)


def test_means_per_token() -> None:
    """(−1 − 2·2)/3 with weights 1, 2, 0; 0 and not 0/0 for a completion that has no token."""
    weight = torch.tensor([[[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]])
    logps = LogProbs(torch.tensor([[[-1.0, -2.0, -3.0], [0.0, 0.0, 0.0]]]), weight)
    assert logps.mean_BG.tolist() == [[pytest.approx(-5 / 3), 0.0]]


def test_sft_is_the_mean_over_tokens() -> None:
    """weigh=token: sum of all token losses over their number; weigh=answer: mean of per-answer means."""
    logps = torch.tensor([[[-1.0, -2.0, -3.0]], [[-4.0, 0.0, 0.0]]])
    mask = torch.tensor([[[True, True, True]], [[True, False, False]]])
    batch = Batch(torch.zeros(2, 1, 3, dtype=torch.long), mask, torch.ones(2, 1), torch.ones(2), {})
    method = methods.make("sft", {})
    loss_B = method.loss(LogProbs(logps), batch)
    assert loss_B.tolist() == [2.0, 4.0]
    weights = torch.tensor([3.0, 1.0])
    assert ((weights * loss_B).sum() / weights.sum()).item() == 2.5  # (1+2+3+4)/4
    assert method.metrics(LogProbs(logps), batch)["logp_gold"].tolist() == [-6.0, -4.0]
