"""Decoder layers of Llama's kind as a few products, one attention and a few passes in C (`fused.c`), for CPUs.

Such a layer is a norm, queries, keys and values, which may have norms of their own, their rotation, attention, a norm,
a gate: dozens of small operations in torch, and twice as many backward, each a way to memory and back and a cast. Here
linear layers that read the same numbers are one product where weights are cast anyway, what lies between products is
one pass, and backward passes keep only what they cannot make again at once. Which layers are of that kind is found by
their parts, and by trying: one that computes anything else, has hooks or wrapped parts (adapters) or weights of other
precisions than float32 is left to itself.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparring import native
from sparring.attention import Layout, Rule, States, drops, named
from sparring.products import Product

log = logging.getLogger("sparring")

_EXACT, _ROUGH = 1e-3, 5e-2
"""Relative errors that a trial allows, of values and gradients in float32 and in bfloat16."""
_BLOCK = 64
"""Tokens whose gradients of a norm's weights `fused.c` sums at a time."""
_FITS: WeakKeyDictionary[nn.Module, tuple[list[nn.Module], bool]] = WeakKeyDictionary()
"""Of layers that were tried their parts, and whether they compute what `_Layer` does."""


class Kernel(NamedTuple):
    """The functions of `fused.c`, compiled for a precision and a head's width."""

    dtype: torch.dtype
    norm: Any
    norm_back: Any
    rotate: Any
    rotate_back: Any
    gate: Any
    gate_back: Any
    add: Any
    sum: Any


@cache
def kernel(dtype: torch.dtype, width: int) -> Kernel | None:
    """The kernel for products of this precision and heads of `width` numbers; None where it cannot be had."""
    sizes = native.sized(dtype, WIDTH=width)
    if sizes is None:
        return None
    return native.tried(
        lambda: _loaded(dtype, sizes),
        lambda made: _problem(made, width),
        "layers in C cannot be had, passes take longer",
    )


def _loaded(dtype: torch.dtype, sizes: dict[str, int]) -> Kernel:
    made = native.library("fused.c", sizes)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    arguments = {
        "norm": [*[pointer] * 6, number, number, ctypes.c_float],
        "norm_back": [*[pointer] * 9, number, number],
        "rotate": [*[pointer] * 6, *[number] * 5, ctypes.c_float],
        "rotate_back": [*[pointer] * 10, *[number] * 3, ctypes.c_float],
        "gate": [*[pointer] * 2, number, number],
        "gate_back": [*[pointer] * 4, number, number],
        "add": [*[pointer] * 3, number],
        "sum": [*[pointer] * 2, number, number, number],
    }
    functions = [getattr(made, name) for name in arguments]
    for function, types in zip(functions, arguments.values(), strict=True):
        function.argtypes, function.restype = types, None
    return Kernel(dtype, *functions)


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Within it and `attention.named` the model's layers that can be are computed so."""
    own = layers(model)
    for layer in own:
        layer.module.__dict__["forward"] = layer
    try:
        yield
    finally:
        for layer in own:
            del layer.module.__dict__["forward"]


def layers(model: nn.Module) -> list[_Layer]:
    """Those of a model that can be computed so."""
    return [layer for module in model.modules() if (layer := _layer(module)) is not None]


def linears(models: Sequence[nn.Module], compute: torch.dtype | None) -> set[nn.Module]:
    """Linear layers that are computed so in this precision."""
    own = [layer for model in models for layer in layers(model) if kernel(compute or torch.float32, layer.width)]
    return {linear for layer in own for linear in layer.linears}


def _layer(module: nn.Module) -> _Layer | None:
    """A module as a layer, if it is one that can be computed so, which is tried once."""
    layer = _looks(module)
    if layer is None or any(_changed(part) for part in module.modules()) or not _own(module, layer):
        return None
    parts = list(module.modules())[1:]
    if module not in _FITS or _FITS[module][0] != parts:
        made = kernel(torch.float32, layer.width)
        apart = torch.inf if made is None else _apart(layer, made)
        if made is not None and not apart < _EXACT:
            _tell(type(module).__name__)
        _FITS[module] = parts, apart < _EXACT
    return layer if _FITS[module][1] else None


@cache
def _tell(name: str) -> None:
    """Once for all layers of a kind."""
    log.info("%s: layers as they are, slower: they compute something else than layers in C", name)


def _looks(module: nn.Module) -> _Layer | None:
    """A module as a layer, if it has a layer's parts."""
    attention, mlp = (module._modules.get(name) for name in ("self_attn", "mlp"))
    norms = [module._modules.get(name) for name in ("input_layernorm", "post_attention_layernorm")]
    if attention is None or mlp is None or any(getattr(norm, "weight", None) is None for norm in norms):
        return None
    linears = [attention._modules.get(f"{name}_proj") for name in "qkvo"]
    linears += [mlp._modules.get(f"{name}_proj") for name in ("gate", "up", "down")]
    width = getattr(attention, "head_dim", None)
    known = all(hasattr(attention, name) for name in ("layer_idx", "scaling"))
    if not known or not width or width % 2 or any(type(linear) is not nn.Linear for linear in linears):
        return None
    of_heads = [own for name in ("q_norm", "k_norm") if (own := attention._modules.get(name)) is not None]
    shapes = [getattr(getattr(own, "weight", None), "shape", None) for own in of_heads]
    if of_heads and (shapes != [(width,)] * 2 or _eps(of_heads[0]) != _eps(of_heads[1])):
        return None
    return _Layer(module, norms, of_heads, linears, width)  # type: ignore[arg-type]


def _changed(module: nn.Module) -> bool:
    """Whether others have a part in what a module computes."""
    return "forward" in module.__dict__ or any(
        getattr(module, name)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


def _own(module: nn.Module, layer: _Layer) -> bool:
    """Whether all of a module's numbers are a layer's, in float32 on a CPU."""
    known = {id(p) for part in (*layer.norms, *layer.linears) for p in part.parameters(recurse=False)}
    return next(module.buffers(), None) is None and all(
        id(p) in known
        and type(p) is nn.Parameter
        and p.dtype == torch.float32
        and p.device.type == "cpu"
        and p.is_contiguous()
        and not p.is_inference()
        for p in module.parameters()
    )


class _Layer:
    """A layer's parts, and its forward pass within `attention.packed`."""

    def __init__(
        self, module: nn.Module, norms: Sequence[Any], of_heads: Sequence[Any], linears: Sequence[nn.Linear], width: int
    ) -> None:
        self.module, self.linears = module, tuple(linears)
        self.norms = (*norms, *of_heads)
        self.before, self.after = norms
        self.of_heads = tuple(of_heads)
        """The norms of queries and of keys, or none."""
        q, k, v, o, gate, up, down = linears
        self.joined: tuple[tuple[nn.Linear, ...], ...] = ((q, k, v), (o,), (gate, up), (down,))
        self.width = width
        self.heads, self.groups = q.out_features // width, k.out_features // width
        attention: Any = module.self_attn
        self.number: int = attention.layer_idx
        self.scale: float = attention.scaling
        self._made: tuple[Any, list[Product]] = (None, [])

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        layout: Layout | None = None,
        **rest: Any,
    ) -> Any:
        """Hidden states [1, N, H] to the next ones: what the layer's own forward is given and gives."""
        compute = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        made = kernel(compute, self.width)
        angles = (1, hidden_states.shape[1], self.width)
        if (
            made is None
            or layout is None
            or position_embeddings is None
            or (self.module.training and drops(self.module))
            or hidden_states.dtype != torch.float32
            or len(hidden_states) != 1
            or any(x.dtype != torch.float32 or x.shape != angles for x in position_embeddings)
        ):
            return type(self.module).forward(
                self.module, hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings,
                layout=layout, **rest,
            )  # fmt: skip
        cos, sin = (x[0].contiguous() for x in position_embeddings)

        def computed(x: Tensor) -> Tensor:
            return self._computed(made, x[0].contiguous(), cos, sin, layout, attention_mask)[None]

        module: Any = self.module
        with torch.autocast("cpu", enabled=False):
            # What transformers does in a layer's own forward
            if module.training and getattr(module, "gradient_checkpointing", False):
                return module._gradient_checkpointing_func(computed, hidden_states)
            return computed(hidden_states)

    def _computed(self, made: Kernel, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, rule: Rule) -> Tensor:
        learns = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.module.parameters()))
        pass_ = _Pass(self, made, self._products(made.dtype, learns), cos, sin)
        if not learns:
            begun = pass_.begin(x)
            mixed = layout.attend(self.number, States(*begun.heads, self.scale, None), rule)
            return pass_.end(x, mixed.reshape(len(x), -1).contiguous())[0]
        q, k, v, o, gate, up, down = self.linears
        given: list[Tensor | None] = [norm.weight for norm in (self.before, *self.of_heads)]
        given += [x for part in (q, k, v) for x in (part.weight, part.bias)]
        query, key, value, x = _Begin.apply(pass_, x, *given)  # type: ignore[no-untyped-call]
        mixed = layout.attend(self.number, States(query, key, value, self.scale, None), rule)
        given = [self.after.weight, *(x for part in (o, gate, up, down) for x in (part.weight, part.bias))]
        out: Tensor = _End.apply(pass_, x, mixed.reshape(len(x), -1), *given)  # type: ignore[no-untyped-call]
        return out

    def _products(self, dtype: torch.dtype, learns: bool) -> list[Product]:
        """Those of the weights as they are; one set of copies is kept."""
        known = dtype, learns, [(id(p), p._version) for linear in self.linears for p in linear.parameters()]
        if self._made[0] != known:
            self._made = None, []
            self._made = known, [Product(own, dtype, fixed=not learns) for own in self.joined]
        return self._made[1]


class _Begun(NamedTuple):
    """What attention is given, and what the way back needs."""

    heads: tuple[Tensor, Tensor, Tensor]
    """Rotated queries and keys, and values, [N, heads, D]."""
    scale: Tensor
    """The norm's, [N]."""
    raw: Tensor | None
    """Queries, keys and values side by side as products made them, where heads have norms."""


@dataclass(frozen=True)
class _Pass:
    """A layer's two halves, before and behind attention, in one pass."""

    layer: _Layer
    made: Kernel
    products: list[Product]
    cos: Tensor
    """[N, D]"""
    sin: Tensor

    def begin(self, x: Tensor) -> _Begun:
        """The first half, of hidden states [N, H]."""
        layer = self.layer
        _, normed, scale = self._norm(layer.before, x, None)
        raw = self.products[0](normed)
        turns = layer.heads + layer.groups
        turned = raw.new_empty(len(x), turns * layer.width) if layer.of_heads else raw
        sizes = len(x), raw.shape[1], turned.shape[1], layer.heads, layer.groups
        _call(self.made.rotate, (raw, self.cos, self.sin, *self._of_heads(), turned), *sizes, self._eps_of_heads())
        query, key = turned.view(len(x), -1, layer.width)[:, :turns].split_with_sizes([layer.heads, layer.groups], 1)
        value = raw.view(len(x), -1, layer.width)[:, turns:]
        return _Begun((query, key, value), scale, raw if layer.of_heads else None)

    def begin_back(
        self, x: Tensor, scale: Tensor, raw: Tensor | None, grads: Sequence[Tensor], rest: Tensor
    ) -> list[Tensor | None]:
        """Gradients of `x`, the norms' weights and the linear layers'."""
        layer, product = self.layer, self.products[0]
        query, key, value = (grad.contiguous() for grad in grads)
        grad = x.new_empty(len(x), sum(product.sizes), dtype=self.made.dtype)
        sums = None if raw is None else x.new_empty(_blocks(x), 2, layer.width)
        tensors = (query, key, value, self.cos, self.sin, raw, *self._of_heads(), grad, sums)
        _call(self.made.rotate_back, tensors, len(x), layer.heads, layer.groups, self._eps_of_heads())
        of_x, _, normed, of_weight = self._norm_back(layer.before, x, scale, product.back(grad), rest, half=False)
        of_heads = [] if sums is None else list(sums.sum(0))
        return [of_x, of_weight, *of_heads, *product.gradients(grad, normed, self._summed)]

    def _of_heads(self) -> Sequence[Tensor | None]:
        """The weights of queries' and of keys' norms."""
        return [norm.weight for norm in self.layer.of_heads] or (None, None)

    def _eps_of_heads(self) -> float:
        return _eps(self.layer.of_heads[0]) if self.layer.of_heads else 0.0

    def end(self, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states and attention's output [N, heads · D] to the next ones; the sum between, its scales, and gates."""
        _, o, wide, down = self.products
        middle, normed, scale = self._norm(self.layer.after, x, o(mixed))
        both = wide(normed)
        opened = both.new_empty(len(both), both.shape[1] // 2)
        _call(self.made.gate, (both, opened), *opened.shape)
        more, out = down(opened), torch.empty_like(middle)
        _call(self.made.add, (middle, more, out), out.numel())
        return out, middle, scale, both

    def end_back(self, mixed: Tensor, middle: Tensor, scale: Tensor, both: Tensor, grad: Tensor) -> list[Tensor | None]:
        """Gradients of `x`, `mixed`, the norm's weight and the linear layers'."""
        _, o, wide, down = self.products
        half = grad.to(self.made.dtype)
        of_both, opened = torch.empty_like(both), both.new_empty(len(both), both.shape[1] // 2)
        _call(self.made.gate_back, (both, down.back(half), of_both, opened), *opened.shape)
        of_x, narrow, normed, of_weight = self._norm_back(
            self.layer.after, middle, scale, wide.back(of_both), grad, half=True
        )
        of_o = o.gradients(narrow, mixed, self._summed)
        return [
            of_x, o.back(narrow), of_weight, *of_o, *wide.gradients(of_both, normed, self._summed),
            *down.gradients(half, opened, self._summed),
        ]  # fmt: skip

    def _norm(self, part: Any, x: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x + more, its norm and one over its root mean squares."""
        out, scale = torch.empty(x.shape, dtype=self.made.dtype), x.new_empty(len(x))
        whole = x if more is None else torch.empty_like(x)
        _call(self.made.norm, (x, more, part.weight, whole, out, scale), *x.shape, _eps(part))
        return whole, out, scale

    def _norm_back(
        self, part: Any, x: Tensor, scale: Tensor, grad: Tensor, rest: Tensor, *, half: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradient of x, the same in the products' precision where `half`, what the norm made, its weight's gradient."""
        of_x, out = torch.empty_like(x), torch.empty(x.shape, dtype=self.made.dtype)
        narrow = torch.empty_like(out) if half and out.dtype != of_x.dtype else None
        sums = x.new_empty(_blocks(x), x.shape[1])
        tensors = (x, part.weight, scale, grad, rest.contiguous(), of_x, narrow, out, sums)
        _call(self.made.norm_back, tensors, *x.shape)
        return of_x, of_x if narrow is None else narrow, out, sums.sum(0)

    def _summed(self, x: Tensor) -> Tensor:
        """[N, C], of which a token's numbers lie one after the other, to sums over tokens in float32."""
        parts = torch.empty(_blocks(x), x.shape[1], dtype=torch.float32)
        _call(self.made.sum, (x, parts), *x.shape, x.stride(0))
        return parts.sum(0)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: _Pass, x: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
        heads, scale, raw = own.begin(x)
        # Weights too, of which `own` has its own view, so that torch tells when they were changed in between
        ctx.save_for_backward(x, scale, raw, *given)
        ctx.own = own
        # x goes through, so that its gradient from behind is added where that of the norm is made
        return *heads, x.view_as(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.own.begin_back(*ctx.saved_tensors[:3], grads[:3], grads[3])


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: _Pass, x: Tensor, mixed: Tensor, *given: Tensor | None) -> Tensor:
        mixed = mixed.contiguous()
        out, middle, scale, both = own.end(x, mixed)
        ctx.save_for_backward(mixed, middle, scale, both, *given)
        ctx.own = own
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.own.end_back(*ctx.saved_tensors[:4], grads[0].contiguous())


def _call(function: Any, tensors: Sequence[Tensor | None], *numbers: float) -> None:
    function(*(None if x is None else x.data_ptr() for x in tensors), *numbers)


def _blocks(x: Tensor) -> int:
    return -(-len(x) // _BLOCK)


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) or 0.0)


def _problem(made: Kernel, width: int) -> str | None:
    """What is wrong with a kernel, tried on layers of transformers' own; None where nothing is."""
    from transformers import LlamaConfig, Qwen3Config
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

    sizes: dict[str, Any] = {
        "hidden_size": 40, "intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 1, "head_dim": width, "attention_bias": True,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = (
            LlamaDecoderLayer(LlamaConfig(**sizes, mlp_bias=True), 0).float(),
            Qwen3DecoderLayer(Qwen3Config(**sizes), 0).float(),
        )
        for parameter in (p for module in modules for p in module.parameters()):
            nn.init.normal_(parameter, 0.5 * (parameter.dim() == 1), 0.3)
    most = _EXACT if made.dtype == torch.float32 else _ROUGH
    for layer in map(_looks, modules):
        assert layer is not None
        apart = _apart(layer, made)
        if not apart < most:
            return f"its results are off by {apart:.2g}"
    return None


def _apart(layer: _Layer, made: Kernel) -> float:
    """How far a layer by a kernel is from the layer's own forward in float32, values and gradients, by relative norms.

    Infinite for a layer that cannot be given what those of this kind are, or whose attention is another.
    """
    with native.apart(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        try:
            return _difference(copy.deepcopy(layer.module).eval().requires_grad_(True), made)
        except Exception:  # layers fail in as many ways as there are layers
            return torch.inf


def _difference(module: nn.Module, made: Kernel) -> float:
    from sparring.tree import Tree

    own = _looks(module)
    assert own is not None
    random = torch.Generator().manual_seed(0)
    tree = Tree([[1, 2, 3], [4]], [[[5, 6, 7], [8, 9]], [[10, 11, 12]]], torch.device("cpu"))
    count, width = tree.ids.shape[1], own.before.weight.shape[0]
    x, upstream = torch.randn(2, 1, count, width, generator=random, dtype=torch.float32)
    x.requires_grad_()
    angle = torch.rand(count, own.width // 2, generator=random, dtype=torch.float32) * 6
    angles = torch.cat([angle, angle], 1)
    cos, sin = angles.cos(), angles.sin()
    rule: Rule = lambda b, h, q, k: k <= q  # noqa: E731
    seen: list[States] = []

    class Watched:
        def attend(self, layer: int, states: States, rule: Rule) -> Tensor:
            seen.append(states)
            return tree.attend(layer, states, rule)

    with named(module):
        forward = type(module).forward
        theirs = forward(module, x, attention_mask=rule, position_embeddings=(cos[None], sin[None]), layout=Watched())
        ours = own._computed(made, x[0], cos, sin, Watched(), rule)[None]
    leaves = [x, *module.parameters()]
    found = [[out.detach() - x.detach(), *torch.autograd.grad(out, leaves, upstream)] for out in (theirs, ours)]
    for norm in own.norms:
        # So small that what is added to mean squares shows
        small = 1e-3 * torch.randn(count, len(norm.weight), generator=random, dtype=torch.float32)
        scale = (small.square().mean(-1, keepdim=True) + _eps(norm)).rsqrt()
        for line, out in zip(found, (norm(small), small * scale * norm.weight), strict=True):
            line.append(out.detach())
    one, other = seen
    if one.scale != other.scale or one.softcap is not None:
        return torch.inf
    return native.most((a - b).norm() / a.norm().clamp(min=1e-30) for a, b in zip(*found, strict=True))
