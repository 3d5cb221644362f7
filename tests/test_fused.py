"""Layers in C against the models' own: values, gradients, decoding; which layers are left to themselves, and why."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import platform
import shutil
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparring import attention, fused, native, products
from sparring.config import TrainConfig
from sparring.fused import _BLOCK, kernel
from sparring.gradient import Setting, gradient
from sparring.logps import packed_token_logps, packs, score
from sparring.methods import make as method
from sparring.play import hf
from sparring.train import prepare
from sparring.types import Frozen, Group
from test_packed import BASE, COMPLETIONS, FAST, PROMPTS, made

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or platform.machine() not in ("x86_64", "aarch64"), reason="no C compiler"
)
BOTH = [torch.float32, torch.bfloat16]
LLAMAS = ["grouped heads", "sliding window", "window in some layers", "norms of heads", "tied"]
"""Of test_packed's models those whose layers are of the kind: Llama, Mistral, Qwen2, whose linear layers have biases, Qwen3
and Granite without factors of its own."""
ODD = BASE | {"hidden_size": 36, "intermediate_size": 50, "head_dim": 6, "num_attention_heads": 6}
"""No size is a multiple of a vector's."""


@pytest.fixture
def plain() -> Any:
    """Something, computed with the models' own layers."""

    def found(make: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "layers", lambda _: [])
            return make()

    return found


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of every layer that was computed in C."""
    found: list[int] = []
    begin = fused._Pass.begin
    monkeypatch.setattr(fused._Pass, "begin", lambda own, x: (found.append(own.layer.number), begin(own, x))[1])
    return found


def drawn(family: str, sizes: dict[str, Any]) -> Any:
    """A model none of whose vectors is all zeros or ones."""
    model = made(family, sizes)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.7, 0.3)
    return model


def computed(model: Any, compute: torch.dtype | None = None) -> tuple[Tensor, list[Tensor]]:
    """Log-probs, and the gradients of a function of them."""
    model.zero_grad()
    got = packed_token_logps(model, PROMPTS, COMPLETIONS, compute=compute)
    (got.sin() * torch.linspace(1, 2, got.numel(), dtype=got.dtype).view(got.shape)).sum().backward()
    return got.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def apart(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest of relative differences, by norms."""
    assert len(some) == len(others)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("small", [0, 2**20], ids=["weights apart", "weights joined"])
@pytest.mark.parametrize("name", [*LLAMAS, "odd"])
def test_values_and_gradients_are_those_of_the_models_own_layers(
    name: str, small: int, plain: Any, begun: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_SMALL", small)
    model = drawn("Llama", ODD) if name == "odd" else drawn(*FAST[name])
    assert len(fused.layers(model)) == model.config.num_hidden_layers
    begun.clear()
    logps, grads = computed(model)
    assert begun == list(range(model.config.num_hidden_layers))
    own, theirs = plain(lambda: computed(model))
    torch.testing.assert_close(logps, own, rtol=1e-5, atol=1e-5)
    assert apart(grads, theirs) < 1e-5
    assert len(grads) == len(list(model.parameters()))


@pytest.mark.parametrize("name", LLAMAS)
def test_in_bfloat16_they_are_no_farther_from_exact_ones(name: str, plain: Any, begun: list[int]) -> None:
    model = drawn(*FAST[name])
    exact = plain(lambda: computed(copy.deepcopy(model).double()))
    logps, grads = computed(model, torch.bfloat16)
    assert begun[-3:] == [0, 1, 2]
    own, theirs = plain(lambda: computed(model, torch.bfloat16))
    assert float((logps - exact[0]).norm()) < 1.1 * float((own - exact[0]).norm())
    gone = [sum(apart([a.double()], [b]) for a, b in zip(g, exact[1], strict=True)) for g in (grads, theirs)]
    assert gone[0] < 1.1 * gone[1] < 1.1 * len(grads) * 0.1


@pytest.mark.parametrize("small", [0, 2**20], ids=["weights apart", "weights joined"])
def test_the_trained_learn_and_the_frozen_do_not(small: int, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some products a part, of some layers nothing; and of linear layers side by side one without a bias."""
    monkeypatch.setattr(products, "_SMALL", small)
    model = drawn(*FAST["window in some layers"])
    model.model.layers[1].self_attn.k_proj.bias = None
    for name, parameter in model.named_parameters():
        frozen = (
            "0.mlp.up_proj",
            "0.self_attn.k_proj.weight",
            "0.self_attn.q_proj.bias",
            "1.input_layernorm",
            "layers.2.",
        )
        parameter.requires_grad_(not any(part in name for part in frozen))
    logps, grads = computed(model)
    own, theirs = plain(lambda: computed(model))
    torch.testing.assert_close(logps, own, rtol=1e-5, atol=1e-5)
    assert apart(grads, theirs) < 1e-5
    assert sum(p.grad is None for p in model.parameters()) == 16 == sum(not p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_scores_and_answers_without_gradients(compute: torch.dtype | None, plain: Any) -> None:
    model = drawn(*FAST["window in some layers"]).requires_grad_(False)

    def answered() -> tuple[Tensor, Tensor]:
        how: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 6, "stop_ids": [], "batch_size": 4}
        answers = hf.sample(model, PROMPTS, range(len(PROMPTS)), compute=compute, **how)
        scored = score(model, PROMPTS, COMPLETIONS, batch_size=4, compute=compute)
        return torch.tensor([a.logps for a in answers]), torch.tensor([x for row in scored for x in row])

    for got, own in zip(answered(), plain(answered), strict=True):
        torch.testing.assert_close(got, own, rtol=0, atol=1e-4 if compute is None else 0.3)
        assert compute is not None or not torch.equal(got, own)  # else nothing was tried


class Guarded:
    """Numbers behind which a function must not write."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        self.whole = torch.full((math.prod(shape) + 64,), 3.0, dtype=dtype)
        self.own = self.whole[:-64].view(shape)

    def kept(self) -> bool:
        return bool((self.whole[-64:] == 3).all())


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(("count", "width"), [(1, 16), (3, 17), (_BLOCK + 1, 31), (300, 128)])
def test_gates_and_sums_by_torch(dtype: torch.dtype, count: int, width: int) -> None:
    """At sizes that leave no lane, one, all but one, and on more numbers than threads are waited for."""
    make = torch.Generator().manual_seed(0)
    own, limit = kernel(dtype, 6), 1e-5 if dtype == torch.float32 else 1e-2
    assert own is not None
    both, grad = (torch.randn(count, n, generator=make).to(dtype) for n in (2 * width, width))
    both[0, 0], both[-1, width - 1], both[0, width] = -100.0, 100.0, torch.nan
    wide = both.float().requires_grad_()
    right = nn.functional.silu(wide[:, :width]) * wide[:, width:]
    (back,) = torch.autograd.grad(right, wide, grad.float())
    out, again, of_both = (Guarded(count, n, dtype=dtype) for n in (width, width, 2 * width))
    fused._call(own.gate, (both, out.own), count, width)
    fused._call(own.gate_back, (both, grad, of_both.own, again.own), count, width)
    assert torch.equal(out.own.nan_to_num(7), again.own.nan_to_num(7)) and out.own.isnan().sum() == 1
    torch.testing.assert_close(out.own.float(), right, rtol=limit, atol=limit, equal_nan=True)
    torch.testing.assert_close(of_both.own.float(), back, rtol=limit, atol=limit, equal_nan=True)
    x, sums = torch.randn(count, width, generator=make), Guarded(count, width, dtype=torch.float32)
    fused._call(own.add, (x, grad, sums.own), x.numel())
    assert torch.equal(sums.own, x + grad)
    of_tokens = Guarded(-(-count // _BLOCK), width, dtype=torch.float32)
    part = both.nan_to_num(2)[:, width:]
    fused._call(own.sum, (part, of_tokens.own), count, width, part.stride(0))
    torch.testing.assert_close(of_tokens.own.sum(0).double(), part.double().sum(0), rtol=1e-5, atol=1e-4)
    assert all(guarded.kept() for guarded in (out, again, of_both, sums, of_tokens))


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("width", [6, 32, 64, 80])
@pytest.mark.parametrize(("count", "norms"), [(5, False), (5, True), (_BLOCK + 3, True)])
def test_rotations_by_torch(dtype: torch.dtype, width: int, count: int, norms: bool) -> None:
    """With angles of their own for both halves of a head, which a model's are not; with and without norms of heads."""
    make = torch.Generator().manual_seed(0)
    own, limit, heads, groups = kernel(dtype, width), 1e-5 if dtype == torch.float32 else 2e-2, 3, 2
    assert own is not None
    stride, turns = (heads + 2 * groups) * width, (heads + groups) * width
    cos, sin = torch.randn(2, count, width, generator=make)
    before = torch.randn(count, stride, generator=make).to(dtype)
    leaf, weights = before.float().requires_grad_(), torch.randn(2, width, generator=make).requires_grad_()
    turned, eps = leaf[:, :turns].view(count, -1, width), 0.5
    if norms:
        each = torch.stack([*weights[:1].expand(heads, -1), *weights[1:].expand(groups, -1)])
        turned = turned * (turned.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * each
    low, high = turned.split(width // 2, -1)
    right = (turned * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]).flatten(1)
    given = tuple(weights.detach()) if norms else (None, None)
    there, elsewhere, back = (Guarded(count, n, dtype=dtype) for n in (stride, turns, stride))
    there.own.copy_(before)
    fused._call(own.rotate, (before, cos, sin, *given, elsewhere.own), count, stride, turns, heads, groups, eps)
    fused._call(own.rotate, (there.own, cos, sin, *given, there.own), count, stride, stride, heads, groups, eps)
    torch.testing.assert_close(elsewhere.own.float(), right, rtol=limit, atol=limit)
    assert torch.equal(there.own, torch.cat([elsewhere.own, before[:, turns:]], 1))
    grad = torch.randn(count, stride, generator=make).to(dtype)
    parts = [part.contiguous() for part in grad.split([heads * width, groups * width, groups * width], 1)]
    sums = Guarded(-(-count // _BLOCK), 2, width, dtype=torch.float32)
    tensors = (*parts, cos, sin, before, *given, back.own, sums.own if norms else None)
    fused._call(own.rotate_back, tensors, count, heads, groups, eps)
    exact = torch.autograd.grad(right, (leaf, weights) if norms else (leaf,), grad.float()[:, :turns])
    exact[0][:, turns:] = grad[:, turns:]
    torch.testing.assert_close(back.own.float(), exact[0], rtol=limit, atol=limit)
    if norms:
        torch.testing.assert_close(sums.own.sum(0), exact[1], rtol=1e-4, atol=1e-4)
    assert all(guarded.kept() for guarded in (there, elsewhere, back, sums))


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("width", [5, 300])
def test_norms_by_torch_whatever_the_threads(dtype: torch.dtype, width: int) -> None:
    """Of a sum; the gradient of weights is summed by blocks of tokens."""
    make = torch.Generator().manual_seed(0)
    own, count = kernel(dtype, 6), 3 * _BLOCK + 5  # of 300 more than threads are waited for
    assert own is not None
    x, rest = torch.randn(2, count, width, generator=make)
    more, grad = torch.randn(2, count, width, generator=make).to(dtype)
    weight = torch.randn(width, generator=make)
    leaf, of = (x + more).double().requires_grad_(), weight.double().requires_grad_()
    right = leaf * (leaf.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * of
    exact = torch.autograd.grad(right, (leaf, of), grad.double())
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            whole, to, scale, sums = (
                Guarded(*shape, dtype=torch.float32) for shape in ((count, width), (count, width), (count,), (4, width))
            )
            out, again, half = (Guarded(count, width, dtype=dtype) for _ in range(3))
            tensors = (x, more, weight, whole.own, out.own, scale.own)
            fused._call(own.norm, tensors, count, width, 1e-5)
            backward = (whole.own, weight, scale.own, grad, rest, to.own, half.own, again.own, sums.own)
            fused._call(own.norm_back, backward, count, width)
            assert torch.equal(out.own, again.own) and torch.equal(half.own, to.own.to(dtype))
            assert torch.equal(whole.own, x + more)
            assert all(guarded.kept() for guarded in (whole, to, scale, sums, out, again, half))
            found.append([out.own, to.own, sums.own])
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    made, to_x, sums_of = found[0]
    torch.testing.assert_close(made.double(), right.detach(), rtol=1e-5 if dtype == torch.float32 else 4e-3, atol=1e-6)
    torch.testing.assert_close((to_x - rest).double(), exact[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums_of.sum(0).double(), exact[1], rtol=1e-4, atol=1e-4)


GROUPS = [
    Group(f"g{i}", tuple(PROMPTS[0]), (tuple(COMPLETIONS[i]), tuple(COMPLETIONS[i + 1])), (1.0, 0.0), 1.0, ("gold", "sample"), 0)
    for i in range(5)
]  # fmt: skip
FROZEN = {
    "reference": [Frozen(g.sha, "reference", "start", tuple((-1.0,) * len(c) for c in g.completions)) for g in GROUPS]
}


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("how", ["as it is", "computed again", "coupled"])
def test_an_optimizer_batch_has_the_same_gradient(
    how: str, compute: torch.dtype | None, plain: Any, begun: list[int]
) -> None:
    """In several passes, with layers that are computed again, and with log-probs of the whole batch first."""
    model = drawn(*FAST["sliding window"])
    prepare(model, TrainConfig(gradient_checkpointing=how == "computed again"))
    objective: Any = method("spin", {"beta": 0.1})
    if how == "coupled":
        objective = SimpleNamespace(loss=objective.loss, metrics=objective.metrics, coupled=True, needs=())

    def learned() -> list[Tensor]:
        model.zero_grad()
        gradient(model, GROUPS, FROZEN, objective, micro_batch=2, setting=Setting(compute))
        return [p.grad.clone() for p in model.parameters()]

    learned()  # so that layers and kernels have been tried
    begun.clear()
    found = learned()
    assert len(begun) == 3 * 3 * (1 if how == "as it is" else 2)  # layers by passes
    assert apart(found, plain(learned)) < (1e-5 if compute is None else 0.1)


def test_second_derivatives_are_an_error_instead_of_wrong() -> None:
    model = drawn(*FAST["grouped heads"])
    logps = packed_token_logps(model, PROMPTS, COMPLETIONS)
    (grad,) = torch.autograd.grad(logps.sum(), model.model.layers[1].mlp.up_proj.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


@pytest.mark.parametrize("name", ["input_layernorm.weight", "self_attn.v_proj.weight", "mlp.down_proj.weight"])
def test_weights_that_change_before_the_backward_pass_are_an_error(name: str) -> None:
    """As with torch's own layers, whose gradient would be of other weights than what was computed."""
    model = drawn(*FAST["grouped heads"])
    logps = packed_token_logps(model, PROMPTS, COMPLETIONS)
    with torch.no_grad():
        model.model.layers[1].get_parameter(name).mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_weights_of_today_are_taken_and_nothing_stays_behind() -> None:
    model = drawn(*FAST["grouped heads"])
    with attention.packed(model):
        before, _ = computed(model, torch.bfloat16)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        after, _ = computed(model, torch.bfloat16)
    assert not torch.equal(before, after) and torch.equal(after, computed(model, torch.bfloat16)[0])
    assert all("forward" not in module.__dict__ for module in model.modules())
    with pytest.raises(KeyError), attention.packed(model):
        assert all("forward" in layer.__dict__ for layer in model.model.layers)
        raise KeyError
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_weights_are_laid_out_once_for_all_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    build = products.Product.__init__

    def counted(self: Any, linears: Any, *given: Any, **how: Any) -> None:
        counts.append(len(linears))
        build(self, linears, *given, **how)

    model = drawn(*FAST["grouped heads"])
    how: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 6, "stop_ids": [], "batch_size": 3}
    hf.sample(model, PROMPTS, range(len(PROMPTS)), **how)
    monkeypatch.setattr(products.Product, "__init__", counted)
    hf.sample(model, PROMPTS, range(len(PROMPTS)), compute=torch.bfloat16, **how)
    assert counts == [3, 1, 2, 1] * model.config.num_hidden_layers
    counts.clear()
    score(model, PROMPTS, COMPLETIONS, batch_size=2, compute=torch.bfloat16)
    assert counts == [3, 1, 2, 1] * model.config.num_hidden_layers


# Left to themselves -------------------------------------------------------------------------------------------------


def test_other_layers_are_left_to_themselves() -> None:
    for name in sorted(set(FAST) - set(LLAMAS)):
        assert not fused.layers(made(*FAST[name])), name


def test_a_layer_that_computes_something_else_is_left_to_itself(caplog: pytest.LogCaptureFixture) -> None:
    fused._tell.cache_clear()
    caplog.set_level(logging.INFO, "sparring")
    assert fused.layers(made(*FAST["tied"]))
    for change in ({"residual_multiplier": 0.9}, {"hidden_act": "gelu"}):
        assert not fused.layers(made("Granite", FAST["tied"][1] | change))
    line = "GraniteDecoderLayer: layers as they are, slower: they compute something else than layers in C"
    assert caplog.messages == [line]


def test_parts_that_layers_of_this_kind_have_not() -> None:
    """Buffers, weights that do not lie together or were made in inference mode, and norms without weights."""
    for buffer in (torch.zeros(1), torch.ones(3)):
        model = made(*FAST["grouped heads"])
        model.model.layers[0].mlp.register_buffer("more", buffer)
        assert len(fused.layers(model)) == 2
    strided = made(*FAST["grouped heads"])
    strided.model.layers[0].input_layernorm.weight = nn.Parameter(torch.ones(64)[::2])
    assert len(fused.layers(strided)) == 2
    with torch.inference_mode():  # whose tensors do not tell when they are changed
        untold = made(*FAST["grouped heads"])
    assert not fused.layers(untold)
    olmo = made("Olmo", BASE)
    assert not fused.layers(olmo) and packs(olmo)


def test_a_part_that_is_replaced_is_tried_again() -> None:
    model = made(*FAST["grouped heads"])
    assert len(fused.layers(model)) == 3
    model.model.layers[1].mlp.act_fn = nn.GELU()
    assert [layer.number for layer in fused.layers(model)] == [0, 2]


def test_the_first_trial_may_be_within_inference_mode() -> None:
    model = made(*FAST["grouped heads"])
    with torch.inference_mode():
        assert len(fused.layers(model)) == 3


def test_norms_of_heads_that_choose_what_they_add_are_left_to_themselves() -> None:
    """torch's own norm takes what its numbers' precision asks for where it is given nothing."""
    model = made(*FAST["norms of heads"])
    assert len(fused.layers(model)) == len(model.model.layers)
    own = model.model.layers[0].self_attn
    own.q_norm, own.k_norm = nn.RMSNorm(own.head_dim), nn.RMSNorm(own.head_dim)
    assert [layer.number for layer in fused.layers(model)] == list(range(1, len(model.model.layers)))


def test_norms_are_tried_with_numbers_so_small_that_what_is_added_shows() -> None:
    class Other(nn.Module):
        def __init__(self, of: Any) -> None:
            super().__init__()
            self.weight, self.eps = of.weight, 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, x.shape[-1:], self.weight, 3e-6)

    for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
        model = made(*FAST["norms of heads"])
        layer = model.model.layers[0]
        layer.set_submodule(name, Other(layer.get_submodule(name)))
        assert [own.number for own in fused.layers(model)] == [1, 2]
    model.model.layers[1].self_attn.k_norm.variance_epsilon = 1e-4  # one for both is all that is known
    assert [own.number for own in fused.layers(model)] == [2]


def test_layers_that_others_have_changed_are_left_to_themselves() -> None:
    model = made(*FAST["grouped heads"])
    assert len(fused.layers(model)) == 3
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert len(fused.layers(model)) == 2
    handle.remove()
    model.model.layers[1].forward = lambda *given, **how: None
    model.model.layers[2].self_attn.q_proj = nn.Sequential(model.model.layers[2].self_attn.q_proj)
    assert len(fused.layers(model)) == 1
    model.model.layers[0].bfloat16()
    assert not fused.layers(model)


def test_adapters_are_left_to_themselves() -> None:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        model: Any = get_peft_model(made(*FAST["grouped heads"]), LoraConfig(target_modules=["q_proj"]))
    assert not fused.layers(model)


def test_rows_of_another_kind_take_the_layers_own_forward(begun: list[int]) -> None:
    """Positions of another width or for another number of tokens, float64 hidden states, numbers that are dropped."""
    model = drawn(*FAST["grouped heads"])
    layer = fused.layers(model)[0]
    tree, (x, angles) = attention_tree(), (torch.randn(1, 4, 32), torch.ones(1, 4, 8))

    def asked(x: Tensor = x, angles: Tensor = angles) -> bool:
        begun.clear()
        with attention.named(model), contextlib.suppress(RuntimeError):  # own layers cannot take all of it either
            layer(x, lambda b, h, q, k: k <= q, (angles, angles), layout=tree)
        return bool(begun)

    assert asked()
    assert not asked(angles=torch.ones(1, 1, 8)) and not asked(angles=torch.ones(1, 4, 4)) and not asked(x=x.double())
    layer.module.train()
    assert asked()
    layer.module.residual_dropout = 0.5  # as Seed-OSS has it
    assert not asked()
    layer.module.eval()
    assert asked()


def attention_tree() -> Any:
    from sparring.tree import Tree

    return Tree([[1, 2]], [[[3, 4, 5]]], torch.device("cpu"))


def test_without_a_compiler_layers_are_the_models_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    caplog.set_level(logging.INFO, "sparring")
    monkeypatch.setattr(fused, "kernel", fused.kernel.__wrapped__)
    assert not fused.layers(made(*FAST["grouped heads"]))
    line = "layers in C cannot be had, passes take longer: there is no C compiler `no-such-compiler`"
    assert set(caplog.messages) == {line}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of these machines")
@pytest.mark.parametrize("dtype", BOTH)
def test_machines_that_can_do_less_compute_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-mno-avx512f", "-mno-avx2", "-mno-fma"))
    sizes = native.sized(dtype, WIDTH=40)
    assert sizes is not None
    assert fused._problem(fused._loaded(dtype, sizes), 40) is None


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("name", ["norm", "norm_back", "rotate", "rotate_back", "gate", "gate_back", "add", "sum"])
def test_a_kernel_that_computes_something_else_is_not_taken(dtype: torch.dtype, name: str) -> None:
    own = kernel(dtype, 8)
    assert own is not None and fused._problem(own, 8) is None
    nothing = own._replace(**{name: lambda *_: None})
    torch.use_deterministic_algorithms(True)  # new memory is filled: what is found there could be the last trial's
    try:
        assert "its results are off by" in (fused._problem(nothing, 8) or "")
    finally:
        torch.use_deterministic_algorithms(False)


def test_trying_layers_leaves_random_numbers_and_models_as_they_were() -> None:
    model = made(*FAST["grouped heads"]).requires_grad_(False)
    state = torch.random.get_rng_state()
    fused.kernel.cache_clear()
    assert fused.layers(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation != attention.NAME


def test_a_difference_that_is_no_number_is_the_largest() -> None:
    assert native.most(torch.tensor([0.1, 0.3])) == pytest.approx(0.3)
    for numbers in ([0.1, torch.nan], [torch.nan, 0.1]):
        assert not native.most(torch.tensor(numbers)) < 1
