"""Fixed points and contraction of exact SPIN rounds on tabular policies, through our own loss and trainer step.

Toy T and its closed forms: Theorem 5.4 of SPIN; the opponent's temperature: docs/theory.md.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sparring import methods
from sparring.train import gradient
from sparring.types import Frozen, Group

P_DATA = torch.tensor([0.30, 0.25, 0.20, 0.12, 0.08, 0.05], dtype=torch.float64)
P_0 = torch.tensor([0.05, 0.10, 0.15, 0.20, 0.25, 0.25], dtype=torch.float64)
KL = {  # vectors.md §8.2: KL(p_data || p_t), t = 0, 1, 2
    0.5: (0.59121123, 0.43814625, 0.59121123),
    0.75: (0.59121123, 0.057368836, 0.006946734),
    1.0: (0.59121123, 0.0, 0.0),
    2.0: (0.59121123, 0.14703314, 0.035866569),
    5.0: (0.59121123, 0.38016164, 0.24266024),
}


class Tabular(nn.Module):
    """A policy over sequences of at most two tokens: one free logit per token after each prefix."""

    def __init__(self, size: int, length: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.second = nn.Parameter(torch.zeros(size, size, dtype=torch.float64)) if length == 2 else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        rows, width = input_ids.shape
        logits = self.first.expand(rows, width, -1)
        if self.second is not None:
            # [prompt, a, b]: the prompt predicts a, a predicts b.
            logits = torch.stack([logits[:, 0], self.second[input_ids[:, 1]], logits[:, 0]], 1)
        return SimpleNamespace(logits=logits)


def answers(size: int, length: int) -> list[tuple[int, ...]]:
    return [(a,) for a in range(size)] if length == 1 else [(a, b) for a in range(size) for b in range(size)]


def log_table(model: Tabular) -> Tensor:
    """Per-token log-probs of every answer, [answers, length]."""
    first = torch.log_softmax(model.first, -1)
    if model.second is None:
        return first[:, None]
    second = torch.log_softmax(model.second, -1)
    size = len(first)
    return torch.stack([first[:, None].expand(size, size), second], -1).reshape(size * size, 2)


def exact_groups(
    data: Tensor, opponent: Tensor, table: Tensor, size: int, length: int
) -> tuple[list[Group], list[Frozen]]:
    """Every pair (y, y') weighted by p_data(y) q(y'): the population loss as one batch."""
    every = answers(size, length)
    groups, frozen = [], []
    for i, gold in enumerate(every):
        for j, sample in enumerate(every):
            if i == j:
                continue  # gradient zero
            weight = float(data[i] * opponent[j])
            group = Group("x", (0,), (gold, sample), (1.0, 0.0), weight, ("gold", "s"), 0)
            groups.append(group)
            frozen.append(Frozen(group.sha, "reference", "p", (tuple(table[i].tolist()), tuple(table[j].tolist()))))
    return groups, frozen


def play_round(model: Tabular, data: Tensor, beta: float, temperature: float = 1.0) -> float:
    """One exact round: minimise the loss to machine precision. Returns the gradient's norm at the start."""
    with torch.no_grad():
        table = log_table(model)
        hot = [
            torch.log_softmax(p / temperature, -1)
            for p in (model.first, *([] if model.second is None else [model.second]))
        ]
        opponent = hot[0].exp() if model.second is None else (hot[0][:, None] + hot[1]).exp().flatten()
    size, length = len(model.first), table.shape[1]
    groups, frozen = exact_groups(data, opponent, table, size, length)
    method = methods.make("spin", {"beta": beta})
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=400, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def step() -> Tensor:
        optimizer.zero_grad()
        held = {"reference": frozen}
        got = gradient(model, groups, held, method, micro_batch=len(groups))
        return torch.tensor(got.loss, dtype=torch.float64)

    step()
    start = float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    optimizer.step(step)  # type: ignore[arg-type]
    return start


def policy(start: Tensor, length: int = 1) -> Tabular:
    model = Tabular(len(start), length)
    with torch.no_grad():
        model.first.copy_(start.log())
    return model


def centred(log_p: Tensor) -> Tensor:
    return log_p - log_p.mean()


def kl(p: Tensor, log_q: Tensor) -> float:
    return float((p * (p.log() - log_q.detach())).sum())


@pytest.mark.parametrize("beta", sorted(KL))
def test_theorem_5_4(beta: float) -> None:
    """p_{t+1} ∝ p_t (p_data / p_t)^(1/λ): the KL table of vectors.md §8."""
    model = policy(P_0)
    found = [kl(P_DATA, log_table(model)[:, 0])]
    for _ in range(2):
        play_round(model, P_DATA, beta)
        found.append(kl(P_DATA, log_table(model)[:, 0].detach()))
    assert found == pytest.approx(KL[beta], rel=2e-5, abs=1e-8)


@pytest.mark.parametrize("beta", [0.75, 1.0, 1.5, 2.0])
def test_contraction_of_the_centred_log_ratio(beta: float) -> None:
    model = policy(P_0)
    before = centred(P_0.log() - P_DATA.log())
    for _ in range(2):
        play_round(model, P_DATA, beta)
        after = centred(log_table(model)[:, 0].detach() - P_DATA.log())
        if before.norm() > 1e-6:
            assert (after - (1 - 1 / beta) * before).norm() / before.norm() < 1e-3
        before = after


@pytest.mark.parametrize("loss", ["logistic", "exponential", "correlation", "hinge"])
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_p_data_is_a_fixed_point(beta: float, loss: str) -> None:
    """Theorem 5.2: at p_t = p_data the gradient vanishes, whatever λ and ℓ."""
    model = policy(P_DATA)
    table = log_table(model).detach()
    groups, frozen = exact_groups(P_DATA, P_DATA, table, 6, 1)
    method = methods.make("spin", {"beta": beta, "loss": loss})
    gradient(model, groups, {"reference": frozen}, method, micro_batch=len(groups))
    assert model.first.grad.norm() < 1e-8


def test_the_expected_spin_gradient_at_the_start_is_half_lambda_times_the_sft_gradient() -> None:
    """With temperature-1 samples the opponent's term has mean zero: a first SPIN step is an SFT step."""
    model = policy(P_0)
    groups, frozen = exact_groups(P_DATA, P_0, log_table(model).detach(), 6, 1)
    spin = methods.make("spin", {"beta": 0.3})
    gradient(model, groups, {"reference": frozen}, spin, micro_batch=8)
    # The pairs y = y' that were left out carry no gradient but their weight: put it back into the mean.
    got = model.first.grad.clone() * sum(g.weight for g in groups)
    model.first.grad = None
    sft = methods.make("sft", {})
    alone = [Group("x", (0,), ((y,),), (1.0,), float(P_DATA[y]), ("gold",), 0) for y in range(6)]
    gradient(model, alone, {}, sft, micro_batch=6)
    assert torch.allclose(got, 0.3 / 2 * model.first.grad, atol=1e-12)


def test_the_same_by_monte_carlo() -> None:
    """Drawn pairs instead of all of them: the gradient is the identity's but for noise, which averages away as 1/√n."""
    model, beta, n = policy(P_0), 0.3, 400_000
    draw = torch.Generator().manual_seed(0)
    gold, sample = (torch.multinomial(p, n, replacement=True, generator=draw) for p in (P_DATA, P_0))
    counts = torch.zeros(6, 6, dtype=torch.float64).index_put((gold, sample), torch.ones(n).double(), accumulate=True)
    table = log_table(model).detach()
    spin = methods.make("spin", {"beta": beta})
    groups, frozen = [], []
    for i, j in ((i, j) for i in range(6) for j in range(6) if i != j):
        groups.append(Group("x", (0,), ((i,), (j,)), (1.0, 0.0), float(counts[i, j]), ("gold", "s"), 0))
        frozen.append(Frozen(groups[-1].sha, "reference", "p", (tuple(table[i].tolist()), tuple(table[j].tolist()))))
    gradient(model, groups, {"reference": frozen}, spin, micro_batch=30)
    got = model.first.grad.clone() * sum(g.weight for g in groups) / n
    exact = beta / 2 * (P_0 - P_DATA)  # λ/2 times the gradient of −E log p(y) in the logits
    error = beta / 2 * ((P_DATA * (1 - P_DATA) + P_0 * (1 - P_0)) / n).sqrt()
    assert ((got - exact).abs() < 4 * error).all()
    assert (exact.abs() > 20 * error).sum() >= 4  # the bound would see a wrong factor


@pytest.mark.parametrize(
    ("beta", "temperature", "rate"), [(1.0, 2.0, 0.5), (0.5, 2.0, 0.0), (0.3, 2.0, 1 - 1 / 0.6), (1.0, 1.5, 1 / 3)]
)
def test_a_hot_opponent_moves_the_fixed_point(beta: float, temperature: float, rate: float) -> None:
    """One-token answers: fixed point p_data^τ, contraction 1 − 1/(λτ) in centred log-space."""
    model = policy(P_0)
    target = temperature * P_DATA.log()
    before = centred(P_0.log() - target)
    for _ in range(2):
        play_round(model, P_DATA, beta, temperature)
        after = centred(log_table(model)[:, 0].detach() - target)
        if before.norm() > 1e-6:
            assert (after - rate * before).norm() / before.norm() < 1e-3
        before = after


def test_on_trees_a_hot_opponent_sharpens_token_by_token() -> None:
    """Two-token answers: the iteration ends at p(v | prefix) ∝ p_data(v | prefix)^τ, not at p_data(y)^τ."""
    size, temperature = 2, 2.0
    first = torch.tensor([0.6, 0.4], dtype=torch.float64)
    second = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64)
    data = (first[:, None] * second).flatten()
    model = Tabular(size, 2)
    for _ in range(12):
        play_round(model, data, 0.6, temperature)
    token_wise = (
        torch.softmax(temperature * first.log(), -1)[:, None] * torch.softmax(temperature * second.log(), -1)
    ).flatten()
    sequence_wise = torch.softmax(temperature * data.log(), -1)
    found = log_table(model).detach().sum(-1).exp()
    assert (found - token_wise).abs().max() < 1e-6
    assert (token_wise - sequence_wise).abs().max() > 0.1
