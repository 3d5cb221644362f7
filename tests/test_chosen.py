"""The log-prob of a token among logits: in C and by torch, against float64, and what happens without a compiler."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from sparring import chosen as module
from sparring import native
from sparring.chosen import Kernel, chosen

SIZES = [(5, 7), (3, 1), (4, 16), (2, 1024), (3, 1025), (6, 2063), (1, 43_520)]


def drawn(rows: int, size: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, tokens (the last and the first of the vocabulary among them) and an upstream gradient."""
    make = torch.Generator().manual_seed(size)
    logits = torch.randn(rows, size, generator=make).mul(spread).to(dtype).requires_grad_()
    tokens = torch.randint(size, (rows,), generator=make)
    tokens[0] = size - 1
    tokens[-1] = 0 if rows > 1 else size - 1
    return logits, tokens, torch.randn(rows, generator=make)


def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "kernel", lambda dtype: None)


@pytest.mark.parametrize("how", ["c", "torch", "parts"])
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.01, 3.0, 30.0])
def test_it_is_the_log_prob_and_its_gradient(
    how: str, shape: tuple[int, int], dtype: torch.dtype, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs to 2e-6 of their size in both precisions; gradients to 1e-6 of theirs, or half a step of bfloat16.

    `parts` is what torch compiles, as it is.
    """
    if how == "c":
        assert module.kernel(dtype) is not None
    else:
        by_torch(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with module.compiled() if how == "parts" else contextlib.nullcontext():
        check(*drawn(*shape, dtype, spread))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    by_torch(monkeypatch)
    torch.compiler.reset()
    counters.clear()
    with module.compiled():
        for shape in SIZES:
            check(*drawn(*shape, dtype))
    assert 0 < counters["stats"]["unique_graphs"] < len(SIZES)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["torch", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_is_the_same(how: str, dtype: torch.dtype) -> None:
    with module.compiled() if how == "compiled" else contextlib.nullcontext():
        for shape in (*SIZES, (300, 151_936)):
            logits, tokens, upstream = (x.cuda() for x in drawn(*shape, dtype))
            check(logits.detach().requires_grad_(), tokens, upstream)


def check(logits: Tensor, tokens: Tensor, upstream: Tensor) -> None:
    dtype = logits.dtype
    out = chosen(logits, tokens)
    (grad,) = torch.autograd.grad(out, logits, upstream)
    wide = logits.detach().double().requires_grad_()
    wanted = wide.log_softmax(-1)[torch.arange(len(tokens)), tokens]
    (wanted_grad,) = torch.autograd.grad(wanted, wide, upstream.double())
    assert out.dtype == torch.float32 and grad.dtype == dtype
    assert ((out - wanted).abs() / (1 + wanted.abs())).max() < 2e-6
    most = 1e-6 if dtype == torch.float32 else 2**-8
    assert (grad - wanted_grad).abs().max() <= most * max(1e-3, float(wanted_grad.abs().max()))


def test_the_gradient_by_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, which torch computes, in blocks of two rows."""
    monkeypatch.setattr(module, "_BLOCK", 14)
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 6, 3, 3, 2])
    assert torch.autograd.gradcheck(lambda x: chosen(x, tokens), (logits,))
    torch.testing.assert_close(chosen(logits, tokens), logits.log_softmax(-1)[torch.arange(5), tokens])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_touch_each_other_and_a_nan_stays_in_its_own(dtype: torch.dtype) -> None:
    logits, tokens, upstream = drawn(6, 2063, dtype)
    with torch.no_grad():
        logits[2, 17] = math.nan
        logits[4, 5:] = -math.inf
    out = chosen(logits, tokens)
    (grad,) = torch.autograd.grad(out, logits, upstream)
    assert out.isnan().tolist() == [False, False, True, False, False, False]
    assert grad.isnan().any(-1).tolist() == [False, False, True, False, False, False]
    for row in (0, 4, 5):
        alone = chosen(logits[row : row + 1], tokens[row : row + 1])
        assert torch.equal(alone[0], out[row])
    assert grad[4, 5:].count_nonzero() <= 1  # but for the token itself, which cannot be


def test_logits_that_do_not_lie_together() -> None:
    logits, tokens, upstream = drawn(6, 2063, torch.float32)
    turned = logits.detach().t().contiguous().t().requires_grad_()
    found = [torch.autograd.grad(chosen(x, tokens), x, upstream.expand(6))[0] for x in (logits, turned)]
    assert torch.equal(*found)


def test_first_used_within_a_checkpoint_it_is_not_counted() -> None:
    """Its trial saves tensors, which a checkpoint would miss when it computes again."""
    logits, tokens, upstream = drawn(3, 50, torch.float32)
    (expected,) = torch.autograd.grad(chosen(logits, tokens), logits, upstream)
    module.kernel.cache_clear()
    (found,) = torch.autograd.grad(checkpoint(chosen, logits, tokens, use_reentrant=False), logits, upstream)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("in_c", [True, False])
def test_second_derivatives_are_an_error_instead_of_wrong(in_c: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not in_c:
        by_torch(monkeypatch)
    logits, tokens, _ = drawn(3, 7, torch.float32)
    (grad,) = torch.autograd.grad(chosen(logits, tokens).square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


@pytest.mark.parametrize("token", [-1, 7])
def test_a_token_beyond_the_vocabulary_is_an_error(token: int) -> None:
    with pytest.raises(IndexError, match=f"a token is beyond the 7 of the vocabulary: {token}"):
        chosen(torch.zeros(2, 7), torch.tensor([token, 5]))
    assert chosen(torch.zeros(0, 7), torch.tensor([], dtype=torch.long)).shape == (0,)


def test_other_types_are_left_to_torch() -> None:
    assert module.kernel(torch.float16) is None and module.kernel(torch.float64) is None


def test_what_cannot_be_had_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sparring")
    loaded = module._loaded

    def said() -> str:
        assert module.kernel.__wrapped__(torch.float32) is None
        (record,) = caplog.records
        caplog.clear()
        return record.getMessage()

    def shorter(made: Kernel, which: str) -> Kernel:
        """One that takes the last logit for none."""
        function = getattr(made, which)
        return made._replace(**{which: lambda *given: function(*given[:-1], given[-1] - 1)})

    for direction in ("forward", "backward"):
        with monkeypatch.context() as patch:
            broken: Any = lambda sizes, which=direction: shorter(loaded(sizes), which)  # noqa: E731
            patch.setattr(module, "_loaded", broken)
            assert said().startswith("log-probs in C cannot be had, passes take longer: its results are off by ")
    with monkeypatch.context() as patch:
        patch.setattr(native, "_FLAGS", (*native._FLAGS, "--no-such-flag"))
        assert "no-such-flag" in said()
    monkeypatch.setenv("CC", "no_such_compiler")
    assert said().endswith("there is no C compiler `no_such_compiler`")
