"""Attention over rows of several sequences, in any transformers model that lets its attention be chosen.

Such a model computes tokens independently of each other but in two places: it asks for a mask, and it hands queries,
keys and values to a function. Both are named by its configuration; here both are ours. Tokens of many sequences then lie
in one row without padding, and a `Layout` says which of them belong together. The mask is the model's own rule over
positions (causal, sliding window, chunked), so what a token may see is never guessed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

NAME = "sparring"
TRACED = "sparring_traced"
"""The same for a decoder that is compiled as one graph (`play/graph.py`)."""
_WITHIN: list[nn.Module] = []
"""Models within `packed`."""
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A model's own word on (batch, head, query position, key position): True where the query may see the key."""


class Layout(Protocol):
    """Which tokens of a row belong together."""

    def attend(self, layer: int, states: States, rule: Rule) -> Tensor:
        """Attention's output [N, heads, D] of a row of N tokens."""
        ...


@dataclass(frozen=True)
class States:
    """What a layer hands to its attention."""

    query: Tensor
    """[N, heads, D]"""
    key: Tensor
    """[N, key heads, D]"""
    value: Tensor
    """[N, key heads, D]"""
    scale: float
    softcap: float | None


def unwrapped(model: Any) -> Any:
    """The model itself, where an adapter's wrapper hides its forward."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def packed(model: nn.Module, name: str = NAME) -> Iterator[None]:
    """Within it the model takes rows of several sequences and a `layout`, and no others; not for two threads at once."""
    from sparring.fused import fused

    if name == NAME and any(own is model for own in _WITHIN):
        yield
        return
    with named(model, name), fused(model) if name == NAME else contextlib.nullcontext():
        _WITHIN.append(model)
        try:
            yield
        finally:
            _WITHIN.pop()


@contextlib.contextmanager
def named(model: nn.Module, name: str = NAME) -> Iterator[None]:
    """`packed`, by the model's own layers."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [
        (c, c._attn_implementation_internal) for c in configs.values() if hasattr(c, "_attn_implementation_internal")
    ]
    _register()
    for config, _ in before:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, own in before:
            config._attn_implementation_internal = own


def is_packed(model: nn.Module) -> bool:
    """Whether the model is within `packed`."""
    return getattr(getattr(model, "config", None), "_attn_implementation_internal", None) == NAME


def drops(module: nn.Module) -> bool:
    """Whether a module, in training mode, drops numbers at random anywhere."""
    values = [value for part in module.modules() for name, value in vars(part).items() if "drop" in name]
    rates = [part.p for part in module.modules() if isinstance(part, nn.Dropout)]
    return any(isinstance(value, float) and value > 0 for value in (*values, *rates))


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for name, function in ((NAME, _opaque()), (TRACED, _attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _mask)


@cache
def _opaque() -> Any:
    """`_attention` as compiled layers (`compiled.py`) call it: a layout is nothing to trace."""
    return torch.compiler.disable(_attention)  # type: ignore[no-untyped-call]


def _mask(*_: Any, mask_function: Rule, **__: Any) -> Rule:
    return mask_function


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Rule,
    *,
    layout: Layout,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """A layer's attention, [1, heads, N, D] each, to [1, N, heads, D]. Raises TypeError for what no layout can do."""
    if dropout or s_aux is not None or position_bias is not None or not callable(attention_mask):
        raise TypeError("its attention has dropout, sinks, biases or a mask of its own")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    states = States(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    with torch.autocast(device, enabled=False):
        return layout.attend(getattr(module, "layer_idx", -1), states, attention_mask)[None], None
