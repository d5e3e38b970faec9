"""Frozen linear layers that multiply in FP8: weights quantised once, tokens and gradients at each pass.

Knows torch's scaled products, for which GPUs from compute capability 8.9 on have units of their own. Does not know adapters: PEFT takes
these layers for the linear ones that they are.

Each row that is summed over has a scale of its own: a token's values, an output's weights on the way forth, an input's on the way back. A
product wants both of its sides row by row, so the weight lies there twice, as it is and transposed: in all the bytes of bf16.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from cluster.cards import MIN_FP8_CAPABILITY
from configs.errors import ClusterError, ModelError

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
# A row of zeros has a scale too; gradients, divided by a batch's number of tokens, are far above this.
SMALLEST_ROW = 1e-30
MAX_WIDTH = 65536  # of a row that the kernel holds whole
GRAIN = 16  # torch's products in FP8 want sizes that are multiples of it
Quantised = tuple[torch.Tensor, torch.Tensor]


def require_fp8() -> None:
    """Refuse a GPU that does not multiply in FP8. Without a GPU all is computed, slowly: parity compares numbers there.

    Raises:
        ClusterError: It is too old.
    """
    if torch.cuda.is_available() and (found := float("{}.{}".format(*torch.cuda.get_device_capability()))) < MIN_FP8_CAPABILITY:
        why = f"{torch.cuda.get_device_name()} has compute capability {found}, and FP8 begins with {MIN_FP8_CAPABILITY}"
        raise ClusterError("train.precision=fp8 wants a GPU that multiplies in FP8", why, "train.precision=auto")


def quantise_rows(values: torch.Tensor) -> Quantised:
    """Return (rows, width) in FP8, and (rows, 1) scales in fp32 that make it the values again."""
    largest = values.abs().amax(-1, keepdim=True).float().clamp(min=SMALLEST_ROW)
    full = torch.full_like(largest, LARGEST)  # a plain number is divided by as by its reciprocal, which rounds twice
    return (values.float() * (full / largest)).to(FP8).contiguous(), largest / full


def _quantise(values: torch.Tensor) -> Quantised:
    """As `quantise_rows`, by a kernel where there is one."""
    if not values.is_cuda or values.shape[-1] > MAX_WIDTH:
        return quantise_rows(values)
    from train import fp8_rows

    return fp8_rows.quantise_rows(values, LARGEST, SMALLEST_ROW)


@dataclass(frozen=True)
class Prepared:
    """Values (..., inputs) as products want them."""

    tokens: torch.Tensor
    scales: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype


def _multiply(values: Prepared, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return values times a quantised weight (outputs, inputs), in the values' format; it is held as `_hold` does."""
    # Fast sums: torchao takes torch's kernels for row-wise scales to be quick with no others, and FP8's own rounding is coarser still.
    sides = (values.tokens, weight.view(FP8).t(), values.scales, scale.view(torch.float32))
    bias = None if bias is None else bias.to(torch.bfloat16)  # a change of the model's format changes it
    product = torch._scaled_mm(*sides, bias, out_dtype=torch.bfloat16, use_fast_accum=True)
    product = product.view(*values.shape[:-1], weight.shape[0])
    # Compiled by torch 2.11, a function that returns what `to` left as it was loses its gradient (pytorch issue 180642).
    return product if product.dtype == values.dtype else product.to(values.dtype)


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """A frozen layer's product, which keeps nothing of its input: only its input has a gradient."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor, layer: "Float8Linear") -> torch.Tensor:
        context.layer = layer
        return layer.multiply(layer.prepare(values))

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return context.layer.multiply_back(gradient), None


class Float8Linear(torch.nn.Linear):  # type: ignore[misc]
    """A frozen linear layer in FP8, with the numbers of the one that it takes the place of."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)  # Linear's own would make a weight
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, layer.weight.dtype
        weight = layer.weight.detach()
        self.forth_weight, self.forth_scale = _hold(weight)
        self.back_weight, self.back_scale = _hold(weight.t())
        self.register_parameter(
            "bias", None if layer.bias is None else Parameter(layer.bias.detach().to(torch.bfloat16), requires_grad=False)
        )

    @property
    def weight(self) -> torch.Tensor:
        """The weight as FP8 has it, made anew for whoever asks: its shape, format and device, and true numbers."""
        return (self.forth_weight.view(FP8).float() * self.forth_scale.view(torch.float32).t()).to(self.dtype)

    def prepare(self, values: torch.Tensor) -> Prepared:
        """Return (..., inputs) as this layer, and any other in FP8, multiplies them."""
        return Prepared(*_quantise(values.detach().reshape(-1, values.shape[-1])), values.shape, values.dtype)

    def multiply(self, prepared: Prepared) -> torch.Tensor:
        """Return the layer's outputs, of which no gradient goes back."""
        return _multiply(prepared, self.forth_weight, self.forth_scale, self.bias)

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the inputs for that of the outputs."""
        return _multiply(self.prepare(gradient), self.back_weight, self.back_scale)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        """Return the layer's outputs for (..., inputs)."""
        product: torch.Tensor = _Product.apply(input, self)
        return product


def _hold(weight: torch.Tensor) -> tuple[Parameter, Parameter]:
    """Return a weight's rows in FP8, and (1, rows) scales in fp32, as frozen parameters.

    Buffers would be sent to all workers at each step. Both are held as bytes, which no change of the model's format touches.
    """
    rows, scales = quantise_rows(weight)
    scales = scales.t().contiguous()
    return Parameter(rows.view(torch.uint8), requires_grad=False), Parameter(scales.view(torch.uint8), requires_grad=False)


def quantise_base(base: Any) -> None:
    """Put layers in FP8 in the place of a base's linear ones, each original let go before the next; the head and odd sizes stay.

    Raises:
        ModelError: There is none that can be.
    """
    head = base.get_output_embeddings()
    names = [name for name, layer in base.named_modules() if type(layer) is torch.nn.Linear and layer is not head]
    fitting = [name for name in names if not any(size % GRAIN for size in base.get_submodule(name).weight.shape)]
    if not fitting:
        why = f"none of its linear layers has sizes that are multiples of {GRAIN}"
        raise ModelError("train.precision=fp8 does not suit this model", why, "train.precision=auto")
    for name in fitting:
        base.set_submodule(name, Float8Linear(base.get_submodule(name)))
