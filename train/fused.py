"""A linear layer and its adapter as one product: forward and back, the adapter's part is added where the base's is written.

PEFT writes the adapter's part, its multiple and the sum each to memory, in every layer and both ways. Knows PEFT's layers. Does not know
the model around them. A layer that does more than that (dropout, several adapters, one merged or switched off) is left to PEFT.
"""

from types import MethodType
from typing import Any

import torch
from torch.nn.functional import linear


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """x W' + scale x A' B', where W has no gradient."""

    @staticmethod
    def forward(
        context: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Take x (tokens, inputs), weight (outputs, inputs), down (rank, inputs) and up (outputs, rank), all in one number format."""
        inner = linear(x, down)
        context.save_for_backward(x, inner, weight, down, up)
        context.scale = scale
        return linear(x, weight, bias).addmm_(inner, up.t(), alpha=scale)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, weight, down, up = context.saved_tensors
        of_inner = (gradient @ up).mul_(context.scale)
        of_x = torch.mm(gradient, weight).addmm_(of_inner, down) if context.needs_input_grad[0] else None
        return of_x, None, None, of_inner.t() @ x, (gradient.t() @ inner).mul_(context.scale), None


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
        if type(base) is torch.nn.Linear and base.weight.dtype == kind and not base.weight.requires_grad:
            with torch.autocast(x.device.type, enabled=False):
                product = _Product.apply(flat, base.weight, base.bias, down, up, scale)
        else:  # a base in 4 bit or FP8 has a product of its own
            product = torch.addmm(base(flat).to(kind), linear(flat, down), up.t(), alpha=scale)
        return product.view(*x.shape[:-1], -1)

    return forward


def _is_plain(layer: Any) -> bool:
    """Whether a layer has one adapter at work, and nothing of PEFT's beside it."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias.get(name):
        return False
    return isinstance(layer.lora_dropout[name], torch.nn.Identity)
