"""Weights in 16 bits for as long as a model is decoded: autocast alone would look for its cast at every token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparring.products import laid_out, multiplies_bfloat16


@contextlib.contextmanager
def halved(models: Sequence[nn.Module], compute: torch.dtype | None, but: Collection[nn.Module] = ()) -> Iterator[None]:
    """Within it, and under autocast, linear layers, `but` these, multiply by casts of their weights that are made once.

    Of other weights autocast keeps its casts, as it does of those that could be trained. Nothing for other than 16 bits.
    """
    if compute not in (torch.bfloat16, torch.float16):
        yield
        return
    layers = {
        m: m.__dict__.get("forward")
        for model in models
        for m in model.modules()
        if type(m) is nn.Linear and m not in but
    }
    frozen = [p for m in models for p in m.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for layer in layers:
            layer.__dict__["forward"] = _multiplied(layer, compute)
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for layer, forward in layers.items():
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.__dict__["forward"] = forward
        for parameter in frozen:
            parameter.requires_grad_(False)


def _multiplied(layer: nn.Linear, compute: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The layer's forward pass in 16 bits."""
    weight, bias = (None if x is None else x.detach().to(compute) for x in (layer.weight, layer.bias))
    assert weight is not None
    if compute == torch.bfloat16 and weight.device.type == "cpu" and multiplies_bfloat16():
        product = laid_out(weight, bias)
        return lambda x: product(x.to(compute))
    return lambda x: functional.linear(x.to(compute), weight, bias)
