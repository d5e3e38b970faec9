"""A block's weights in 4 bit, unpacked in one go: into memory that the next block's take, when one of its layers is first multiplied.

bitsandbytes unpacks each layer by itself, each time: three calls a layer, three times a step where blocks are recomputed, and that
takes a host longer than the GPU its products. Here a block's layers lie behind one another, and are unpacked by three calls together; on
the way back those that its recomputing has unpacked still lie there. Knows bitsandbytes' layers. Does not know what is multiplied. A deep
copy is for tests alone: of each layer it copies the whole block.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch

MAX_WEIGHTS = 2**31 - 1  # which bitsandbytes' kernels can count


class Scratch:
    """Memory for one block's weights, and whose are in it."""

    def __init__(self, num_weights: int, dtype: torch.dtype, device: torch.device) -> None:
        self.weights = torch.empty(num_weights, dtype=dtype, device=device)
        self.owner: Packed | None = None

    def forget(self) -> None:
        """Have weights unpacked anew when they are next asked for: what lies here is not known any more."""
        self.owner = None


class Packed:
    """The weights of a block's layers in 4 bit, behind one another, where no two layers share a scale."""

    def __init__(self, layers: Sequence[Any], scratch: Scratch) -> None:
        states = [layer.weight.quant_state for layer in layers]
        self.scratch, first = scratch, states[0]
        self.blocksize, self.quant_type, self.nested = first.blocksize, first.quant_type, first.nested
        sizes, in_one = [num_aligned(layer) for layer in layers], num_in_one(first)
        begins = [0, *accumulate(sizes)]
        self.num_weights = begins.pop()
        self.values = _joined([layer.weight.data.view(torch.uint8) for layer in layers], [size // 2 for size in sizes])
        self.scales = _joined([state.absmax for state in states], [size // self.blocksize for size in sizes])
        if self.nested:
            self.scale_size, self.code = first.state2.blocksize, first.state2.code
            self.scales_of_scales = _joined([state.state2.absmax for state in states], [size // in_one for size in sizes])
            counts = torch.tensor([size // in_one for size in sizes], device=self.values.device)
            self.offsets = torch.stack([state.offset for state in states]).repeat_interleave(counts).view(-1, 1)
        for layer, begin in zip(layers, begins, strict=True):
            weight, state = layer.weight, layer.weight.quant_state
            # The layer's own are views, so that all that knows it alone still finds them.
            weight.data = self.values[begin // 2 :][: weight.numel() * weight.itemsize].view(weight.dtype).view(weight.shape)
            state.absmax = self.scales[begin // self.blocksize :][: state.absmax.numel()]
            if self.nested:
                state.state2.absmax = self.scales_of_scales[begin // in_one :][: state.state2.absmax.numel()]
            layer.unpacked = Unpacked(self, weight, scratch.weights[begin:][: state.shape.numel()].view(state.shape))

    def unpack(self) -> None:
        """Unpack all layers, as bitsandbytes does each."""
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        scales = self.scales
        if self.nested:
            scales = dequantize_blockwise(scales, absmax=self.scales_of_scales, code=self.code, blocksize=self.scale_size)
            scales.view(-1, self.scale_size).add_(self.offsets)
        out = self.scratch.weights[: self.num_weights]
        state = QuantState(scales, out.shape, blocksize=self.blocksize, quant_type=self.quant_type, dtype=out.dtype)
        if out.is_cuda:
            dequantize_4bit(self.values, state, out=out)
        else:  # there it knows no place to unpack to
            out.copy_(dequantize_4bit(self.values, state).view(-1))
        self.scratch.owner = self


class Unpacked:
    """One layer's weight, for the moment."""

    def __init__(self, packed: Packed, of: torch.Tensor, weight: torch.Tensor) -> None:
        self.packed, self.of, self._weight = packed, of, weight
        """`of` is the layer's own, which PEFT replaces where it merges an adapter: then this one is past."""

    @property
    def dtype(self) -> torch.dtype:
        """The weight's number format."""
        return self._weight.dtype

    def take(self) -> torch.Tensor:
        """Return the weight, (outputs, inputs); it is good until a layer of another block is multiplied."""
        if self.packed.scratch.owner is not self.packed:
            self.packed.unpack()
        return self._weight


def unpacked_of(layer: Any) -> Unpacked | None:
    """Return what gives a layer's weight; None where it is not packed with its block's, or has got another weight since."""
    unpacked: Unpacked | None = getattr(layer, "unpacked", None)
    return unpacked if unpacked and unpacked.of is layer.weight else None


def pack_by_block(blocks: Iterable[Any]) -> None:
    """Have each block's 4-bit layers that have an adapter unpacked together, where they are alike; the others stay as they are."""
    alike = [layers for layers in map(_packed_layers, blocks) if len(set(map(_kind, layers))) == 1]
    largest: dict[tuple[torch.dtype, torch.device], int] = {}
    for layers in alike:
        place = _place(layers)
        largest[place] = max(largest.get(place, 0), sum(map(num_aligned, layers)))
    scratches = {place: Scratch(num_weights, *place) for place, num_weights in largest.items() if num_weights <= MAX_WEIGHTS}
    for layers in alike:
        if scratch := scratches.get(_place(layers)):
            Packed(layers, scratch)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of the layers' own


def scratches_of(model: Any) -> list[Scratch]:
    """Return the memory into which a model's layers are unpacked."""
    found = {id(layer.unpacked.packed.scratch): layer.unpacked.packed.scratch for layer in model.modules() if hasattr(layer, "unpacked")}
    return list(found.values())


def num_aligned(layer: Any) -> int:
    """Return how many weights a layer takes among others."""
    state = layer.weight.quant_state
    return -(int(state.shape.numel()) // -num_in_one(state)) * num_in_one(state)


def num_in_one(state: Any) -> int:
    """Return how many weights have one scale, or one scale of scales, where those are in 8 bit too."""
    return int(state.blocksize) * (int(state.state2.blocksize) if state.nested else 1)


def _packed_layers(block: Any) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    bases = [layer.get_base_layer() for layer in block.modules() if isinstance(layer, LoraLayer)]
    layers = [base for base in bases if isinstance(base, torch.nn.Linear) and is_packed(base._parameters.get("weight"))]
    return [] if any(unpacked_of(layer) for layer in layers) else layers  # a base may get another adapter


def is_packed(weight: Any) -> bool:
    """Whether a weight is frozen in 4 bit, as bitsandbytes packs it for a GPU; on a CPU it may have packed it anew."""
    state = getattr(weight, "quant_state", None)
    return state is not None and not getattr(state, "packing_format_for_cpu", False) and not weight.requires_grad


def _kind(layer: Any) -> tuple[Any, ...]:
    state = layer.weight.quant_state
    nested = (state.state2.blocksize, state.state2.dtype) if state.nested else None
    return state.quant_type, state.blocksize, state.dtype, nested, layer.weight.device


def _place(layers: Sequence[Any]) -> tuple[torch.dtype, torch.device]:
    return layers[0].weight.quant_state.dtype, layers[0].weight.device


def _joined(parts: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    """Lay parts behind one another, each filled up with noughts to its size."""
    whole = torch.zeros(sum(sizes), dtype=parts[0].dtype, device=parts[0].device)
    for place, part in zip(whole.split(list(sizes)), parts, strict=True):
        place[: part.numel()] = part.view(-1)
    return whole
