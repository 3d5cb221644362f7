"""Weights in 16 bits for as long as a model is decoded: autocast alone would look for its cast at every token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


@contextlib.contextmanager
def halved(models: Sequence[nn.Module], compute: torch.dtype | None) -> Iterator[None]:
    """Within it, and under autocast, linear layers multiply by casts of their weights that are made once.

    Of other weights autocast keeps its casts, as it does of those that could be trained. Nothing for other than 16 bits.
    """
    if compute not in (torch.bfloat16, torch.float16):
        yield
        return
    layers = {m: m.__dict__.get("forward") for model in models for m in model.modules() if type(m) is nn.Linear}
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
    """The layer's forward pass in 16 bits.

    Where a CPU has products of bfloat16, weights lie as those read them: else they are laid out anew for every product
    of a few rows, which takes as long as the product.
    """
    weight, bias = (None if x is None else x.detach().to(compute) for x in (layer.weight, layer.bias))
    assert weight is not None
    if compute == torch.bfloat16 and weight.device.type == "cpu" and _multiplies_bfloat16():
        laid_out, product = torch.ops.mkldnn._reorder_linear_weight(weight), torch.ops.mkldnn._linear_pointwise
        return lambda x: product(x.to(compute), laid_out, bias, "none", [], "")  # type: ignore[no-any-return]
    return lambda x: functional.linear(x.to(compute), weight, bias)


def _multiplies_bfloat16() -> bool:
    """Whether torch was built with the library that has such products, which on a Mac it is not, and the CPU has them."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
