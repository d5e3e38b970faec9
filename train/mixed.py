"""Rows of several adapters in one pass through one base: laid end to end, each row blind to the others, each with its own adapter.

Knows PEFT's layers. Does not know optimizers, or who the adapters belong to.

In each linear layer the adapters' matrices are stacked, so that one product with all of them, and a mask that leaves each token only its
own adapter's part, stands for one product for each adapter: with small ranks the work in vain costs less than the kernels it saves.
PEFT's own mixed batches (`adapter_names=`) loop over the adapters in each layer, and are refused in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch.nn.functional import linear

from data.template import NO_LOSS
from train.attention import Spread, spread
from train.rows import Row

Layout = tuple[tuple[int, int, float], ...]  # of each adapter in a stack: its slot, rank and scale


@dataclass
class Stack:
    """One layer's matrices of all adapters, each adapter's rows together; these are what the gradient reaches."""

    down: torch.Tensor
    """(sum of ranks, inputs)"""
    up: torch.Tensor
    """(sum of ranks, outputs)"""
    layout: Layout


@dataclass
class Batch:
    """Rows laid end to end, as tensors on the base's device."""

    slots: list[int]
    """Which adapters have rows here, in their order."""
    num_targets: list[int]
    """How many tokens carry loss for each of `slots`."""
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    owners: torch.Tensor
    """The slot of each token."""
    sources: torch.Tensor
    """Places of the tokens whose next one carries loss."""
    targets: torch.Tensor
    """Those next tokens."""
    rows: Spread
    masks: dict[Layout, torch.Tensor] = field(default_factory=dict)

    def mask(self, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
        """Return (tokens, sum of ranks): the scale where the column belongs to the token's adapter, else zero."""
        if layout not in self.masks:
            columns = torch.tensor([slot for slot, rank, _ in layout for _ in range(rank)], device=self.owners.device)
            values = [scale for _, rank, scale in layout for _ in range(rank)]
            scales = torch.tensor(values, dtype=dtype)
            if scales.tolist() != values:  # bf16 has no 11.3, and would scale all of a token's part by 11.25
                scales = torch.tensor(values, dtype=torch.promote_types(dtype, torch.float32))
            self.masks[layout] = (self.owners[:, None] == columns) * scales.to(self.owners.device)
        return self.masks[layout]


def make_batch(rows: Sequence[tuple[int, Row]], device: torch.device) -> Batch:
    """Lay rows end to end; each comes with the slot of its adapter, and those of one adapter come together."""
    tokens: list[int] = []
    positions: list[int] = []
    owners: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    lengths = [len(row["input_ids"]) for _, row in rows]
    num_targets: dict[int, int] = {}
    for number, (slot, row) in enumerate(rows):
        begin, length = len(tokens), lengths[number]
        tokens += row["input_ids"]
        positions += range(length)
        owners += [slot] * length
        found = [place for place in range(1, length) if row["labels"][place] != NO_LOSS]
        sources += [begin + place - 1 for place in found]
        targets += [row["labels"][place] for place in found]
        num_targets[slot] = num_targets.get(slot, 0) + len(found)

    def send(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=device)

    return Batch(
        slots=list(num_targets),
        num_targets=list(num_targets.values()),
        input_ids=send(tokens)[None],
        position_ids=send(positions)[None],
        owners=send(owners),
        sources=send(sources),
        targets=send(targets),
        rows=spread(lengths).to(device),
    )


class Mixer:
    """Makes the layers of PEFT's model, and its attention, take batches of several adapters."""

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.stacks: dict[int, Stack] = {}  # by the layer's id

    def take_over(self, layer: Any) -> None:
        """Give one of PEFT's layers the forward pass over its stack."""
        mixer = self

        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.base_layer(x)
            stack, batch = mixer.stacks.get(id(self)), mixer.batch
            if stack is None or batch is None:
                return result
            inner = linear(x, stack.down).flatten(0, 1)
            mixed = torch.addmm(result.flatten(0, 1), inner * batch.mask(stack.layout, inner.dtype), stack.up)
            return mixed.view_as(result).to(result.dtype)

        layer.forward = MethodType(forward, layer)
