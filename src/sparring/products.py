"""Products of hidden states with the weights of linear layers, as CPUs multiply them fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

_SMALL = 2**20
"""Weights in float32 that are copied, so that they are one product."""


class Product:
    """Linear layers that read the same numbers.

    Where weights are cast anyway, or small, they lie one after the other and are one product; where they are not changed
    (`fixed`) and the CPU multiplies bfloat16, as its products read them.
    """

    def __init__(self, linears: Sequence[nn.Linear], dtype: torch.dtype, *, fixed: bool) -> None:
        self.linears = linears
        self.sizes = [linear.out_features for linear in linears]
        self.weights = [linear.weight.detach() for linear in linears]
        self.biases: list[Tensor | None] = [None if x.bias is None else x.bias.detach() for x in linears]
        self._laid_out: Callable[[Tensor], Tensor] | None = None
        numbers = sum(weight.numel() for weight in self.weights)
        if dtype == torch.float32 and (len(linears) == 1 or numbers > _SMALL):
            return
        joint = torch.empty(sum(self.sizes), linears[0].in_features, dtype=dtype)
        for part, weight in zip(joint.split_with_sizes(self.sizes), self.weights, strict=True):
            part.copy_(weight)
        bias = None
        if any(own is not None for own in self.biases):
            bias = torch.cat(
                [joint.new_zeros(n) if b is None else b.to(dtype) for n, b in zip(self.sizes, self.biases, strict=True)]
            )
        self.weights, self.biases = [joint], [bias]
        if fixed and dtype == torch.bfloat16 and multiplies_bfloat16():
            self.weights, self._laid_out = [], laid_out(joint, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """[N, in] to [N, out], side by side."""
        if self._laid_out is not None:
            return self._laid_out(x)
        if len(self.weights) == 1:
            return functional.linear(x, self.weights[0], self.biases[0])
        out = x.new_empty(len(x), sum(self.sizes))
        for part, weight, bias in zip(out.split_with_sizes(self.sizes, 1), self.weights, self.biases, strict=True):
            if bias is None:
                torch.mm(x, weight.t(), out=part)
            else:
                torch.addmm(bias, x, weight.t(), out=part)
        return out

    def back(self, grad: Tensor) -> Tensor:
        """The gradient of what was read, [N, in]."""
        parts = grad.split_with_sizes([len(weight) for weight in self.weights], 1)
        out: Tensor = parts[0] @ self.weights[0]
        for part, weight in zip(parts[1:], self.weights[1:], strict=True):
            torch.addmm(out, part, weight, out=out)
        return out

    def gradients(self, grad: Tensor, x: Tensor, summed: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        """Those of each layer's weight and bias, in float32; None for what does not learn. `summed` sums over tokens."""
        found: list[Tensor | None] = []
        parts = grad.split_with_sizes([len(weight) for weight in self.weights], 1)
        learn = any(own.weight.requires_grad for own in self.linears)
        wholes = [(part.t() @ x).float() for part in parts] if learn else []
        of_weights = [own for one in wholes for own in one.split_with_sizes(self.sizes)] if len(wholes) == 1 else wholes
        for i, (linear, part) in enumerate(zip(self.linears, grad.split_with_sizes(self.sizes, 1), strict=True)):
            found.append(of_weights[i] if linear.weight.requires_grad else None)
            learns = linear.bias is not None and linear.bias.requires_grad
            found.append(summed(part) if learns else None)
        return found


def multiplies_bfloat16() -> bool:
    """Whether torch was built with the library that has such products, which on a Mac it is not, and the CPU has them."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def laid_out(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A linear layer in bfloat16 whose weights lie as a CPU's products read them.

    Else they are laid out anew for every product of a few rows, which takes as long as the product.
    """
    own, product = torch.ops.mkldnn._reorder_linear_weight(weight), torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, own, bias, "none", [], "")  # type: ignore[no-any-return]
