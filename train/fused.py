"""A linear layer and its adapter as one product: forward and back, the adapter's part is added where the base's is written.

PEFT writes the adapter's part, its multiple and the sum each to memory, in every layer and both ways. Knows PEFT's layers, and how a
frozen base multiplies in bf16, FP8 and 4 bit. Does not know the model around them. A layer that does more than that (dropout, several
adapters, one merged or switched off) is left to PEFT.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch.nn.functional import linear

from train.fp8 import Float8Linear
from train.unpacked import Unpacked

Sides = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]
"""A frozen layer's product of (tokens, inputs), and that of its output's gradient, (tokens, outputs); each makes a new tensor."""


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """x W' + scale x A' B', where W has no gradient."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float, sides: Sides) -> torch.Tensor:
        """Take x (tokens, inputs), down (rank, inputs) and up (outputs, rank), all in one number format."""
        inner = linear(x, down)
        context.save_for_backward(x, inner, down, up)
        context.scale, context.back = scale, sides[1]
        return sides[0](x).addmm_(inner, up.t(), alpha=scale)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, down, up = context.saved_tensors
        of_inner = (gradient @ up).mul_(context.scale)
        of_x = context.back(gradient).addmm_(of_inner, down) if context.needs_input_grad[0] else None
        return of_x, of_inner.t() @ x, (gradient.t() @ inner).mul_(context.scale), None, None


def fuse_adapter(model: Any) -> None:
    """Give each of a PEFT model's LoRA layers that does no more than such a product this forward pass."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), torch.nn.Linear):
            layer.forward = MethodType(_with_fallback(type(layer).forward), layer)


def _with_fallback(of_peft: Any) -> Any:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not _is_plain(self):
            found: torch.Tensor = of_peft(self, x, *args, **kwargs)
            return found
        (name,) = self.active_adapters
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        down, up, scale = self.lora_A[name].weight.to(kind), self.lora_B[name].weight.to(kind), self.scaling[name]
        base, x = self.base_layer, x.to(kind)
        flat = x.reshape(-1, x.shape[-1])
        if sides := _sides(base, kind):
            product = _Product.apply(flat, down, up, scale, sides)
        else:  # a layer with a product of its own
            product = torch.addmm(base(flat).to(kind), linear(flat, down), up.t(), alpha=scale)
        return product.view(*x.shape[:-1], -1)

    return forward


def _sides(base: torch.nn.Linear, kind: torch.dtype) -> Sides | None:
    """Return how a frozen layer multiplies values of this number format; None where only the layer knows."""
    if isinstance(base, Float8Linear):
        return base.multiply, base.multiply_back
    weight, bias = base.weight, base.bias
    if weight.requires_grad:
        return None
    if type(base) is torch.nn.Linear and weight.dtype == kind:
        return lambda x: linear(x, weight, bias), lambda gradient: gradient @ weight
    bias = None if bias is None else bias.to(kind)
    unpacked: Unpacked | None = getattr(base, "unpacked", None)
    if unpacked and unpacked.dtype == kind:
        return lambda x: linear(x, unpacked.take(), bias), lambda gradient: gradient @ unpacked.take()
    if (packed := getattr(weight, "quant_state", None)) is None or getattr(packed, "packing_format_for_cpu", False):
        return None
    from bitsandbytes.functional import dequantize_4bit

    def whole() -> torch.Tensor:
        """As bitsandbytes itself does for more than a few tokens, through layers of Python that take longer than the product."""
        found: torch.Tensor = dequantize_4bit(weight.data, packed).to(kind)
        return found

    return lambda x: linear(x, whole(), bias), lambda gradient: gradient @ whole()


def _is_plain(layer: Any) -> bool:
    """Whether a layer has one adapter at work, and nothing of PEFT's beside it."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias.get(name):
        return False
    return isinstance(layer.lora_dropout[name], torch.nn.Identity)
