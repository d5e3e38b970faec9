"""How a frozen layer multiplies, forth and back: in full, in FP8, or out of 4 bit.

Knows the three kinds of weights. Does not know adapters. Nothing here has a gradient: who asks keeps its own books.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn.functional import linear

from train.fp8 import Float8Linear
from train.unpacked import is_packed, unpacked_of


class Frozen(Protocol):
    """A frozen layer's products; each makes a new tensor, unless it is told what to add to."""

    def prepare(self, x: torch.Tensor) -> Any:
        """Return what this layer, and those of its kind that read the same values, multiply for x (tokens, inputs)."""

    def multiply(self, prepared: Any) -> torch.Tensor:
        """Return the outputs, (tokens, outputs)."""

    def multiply_back(self, gradient: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        """Return the inputs' gradient for that of the outputs, added to another's if one is given."""


class Weight:
    """A weight that is there in full when it is asked for."""

    def __init__(self, take: Callable[[], torch.Tensor], bias: torch.Tensor | None) -> None:
        self.take, self.bias = take, bias

    def prepare(self, x: torch.Tensor) -> Any:
        """Return it as it is."""
        return x

    def multiply(self, prepared: Any) -> torch.Tensor:
        """Multiply as torch's own layer does."""
        return linear(prepared, self.take(), self.bias)

    def multiply_back(self, gradient: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        """Multiply, and add where the product is written."""
        return gradient @ self.take() if onto is None else onto.addmm_(gradient, self.take())


class InFp8:
    """A layer in FP8, which quantises what it reads."""

    def __init__(self, layer: Float8Linear) -> None:
        self.layer = layer

    def prepare(self, x: torch.Tensor) -> Any:
        """Quantise x, once for all that read it."""
        return self.layer.prepare(x)

    def multiply(self, prepared: Any) -> torch.Tensor:
        """Multiply what was quantised."""
        return self.layer.multiply(prepared)

    def multiply_back(self, gradient: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        """Multiply, and add: torch's product in FP8 cannot do both at once."""
        product = self.layer.multiply_back(gradient)
        return product if onto is None else onto.add_(product)


def frozen_of(base: torch.nn.Linear, kind: torch.dtype) -> Frozen | None:
    """Return how a frozen layer multiplies values of this number format; None where only the layer knows."""
    if isinstance(base, Float8Linear):
        return InFp8(base)
    weight, bias = base.weight, base.bias
    if weight.requires_grad:
        return None
    if type(base) is torch.nn.Linear and weight.dtype == kind:
        return Weight(partial(_whole, base), bias)
    bias = None if bias is None else bias.to(kind)
    if (unpacked := unpacked_of(base)) and unpacked.dtype == kind:
        return Weight(unpacked.take, bias)
    if not is_packed(weight):
        return None
    return Weight(partial(_taken_out, base, kind), bias)


def _whole(base: torch.nn.Linear) -> torch.Tensor:
    return base.weight


def _taken_out(base: torch.nn.Linear, kind: torch.dtype) -> torch.Tensor:
    """As bitsandbytes itself does for more than a few tokens, through layers of Python that take longer than the product."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = base.weight
    whole: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return whole.to(kind)
