"""A loss that compares groups: the cached gradient is that of the whole batch in one graph, however it is split."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparring import methods
from sparring.gradient import Setting, collate, gradient, policy_logps
from sparring.types import Frozen, Group
from test_theory import Tabular


@pytest.mark.parametrize("name", ["iris", "kto"])
@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_the_cached_gradient_is_the_whole_batchs(name: str, micro_batch: int) -> None:
    generator = torch.Generator().manual_seed(1)
    model = Tabular(5, 1)
    with torch.no_grad():
        model.first.copy_(torch.randn(5, generator=generator, dtype=torch.float64))
    pairs = [(0, 1), (2, 3), (1, 4), (3, 0)]
    groups = [
        Group("x", (0,), ((a,), (b,)), (1.0, 0.0), weight, ("gold", "s"), 0)
        for (a, b), weight in zip(pairs, (1.0, 2.0, 0.5, 1.5), strict=True)
    ]
    frozen = {"reference": [Frozen(g.sha, "reference", "p", ((-1.0 - i,), (-2.0,))) for i, g in enumerate(groups)]}
    method = methods.make(name, {})
    assert method.coupled
    got = gradient(model, groups, frozen, method, micro_batch=micro_batch)
    cached = model.first.grad.clone()  # type: ignore[union-attr]
    model.zero_grad()
    batch = collate(groups, frozen, torch.device("cpu"), torch.float64)
    value = method.loss(policy_logps(model, groups, batch, Setting()), batch)
    whole = (batch.weight_B / batch.weight_B.sum() * value).sum()
    whole.backward()  # type: ignore[no-untyped-call]
    assert got.loss == pytest.approx(float(whole.detach()), abs=1e-12)
    assert isinstance(model.first, nn.Parameter) and model.first.grad is not None
    assert model.first.grad.norm() > 1e-3
    assert torch.allclose(cached, model.first.grad, atol=1e-12)
