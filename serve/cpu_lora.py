"""Adapters on an engine without a GPU: one product a batch and adapter, instead of one gathered matrix a token.

Knows vLLM's CPU worker. Imported by the engine's own process alone, by the name that `serve.engine` gives it.

vLLM's own CPU path copies an adapter's matrices once for each token, and where a token has no adapter its index of -1 picks the last
slot: with all slots taken, the base answers with the adapter in the last one.
"""

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker


class GroupedLora(PunicaWrapperCPU):  # type: ignore[misc]
    """Adds each adapter's share to the rows of a batch that asked for it."""

    groups: list[tuple[int, torch.Tensor | None]]
    """Slot of each adapter in the batch and its rows; None stands for all rows."""

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Note, once a batch, which rows belong to which slot."""
        super().update_metadata(*args, **kwargs)
        indices = self.token_lora_indices
        slots = indices.unique().tolist()
        self.groups = [(slot, (indices == slot).nonzero().flatten() if len(slots) > 1 else None) for slot in slots if slot >= 0]

    def add_lora_linear(
        self,
        y: torch.Tensor,  # (tokens, sum of output_slices), changed in place
        x: torch.Tensor,  # (tokens, inputs)
        lora_a_stacked: tuple[torch.Tensor, ...],  # each (slots, 1, rank, inputs)
        lora_b_stacked: tuple[torch.Tensor, ...],  # each (slots, 1, outputs of its slice, rank)
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        """Add `x A B * scale`, slice by slice, to the rows of each adapter."""
        for slot, rows in self.groups:
            inputs, begin = x if rows is None else x[rows], 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                delta = (inputs @ a[slot, 0].T) @ b[slot, 0].T
                part = y[:, begin : begin + width]
                if rows is None:
                    part.add_(delta, alpha=scale)
                else:
                    part.index_add_(0, rows, delta, alpha=scale)
                begin += width

    def add_lora_logits(
        self,
        y: torch.Tensor,  # (rows, vocabulary), changed in place
        x: torch.Tensor,  # (rows, width)
        lora_a_stacked: torch.Tensor,  # (slots, 1, rank, width)
        lora_b_stacked: torch.Tensor,  # (slots, 1, vocabulary, rank)
        scale: float,
        **_: Any,
    ) -> None:
        """Add the share of adapters of the output layer, which few have; vLLM's own multiplies by zeros, and dies of `prompt_logprobs`.

        For those, vLLM asks for the logits of one prompt without saying whose it is: they are left without that share.
        """
        slots = self.sampler_indices
        if len(slots) != len(x):
            return
        for slot in slots.unique().tolist():
            if slot >= 0 and lora_a_stacked[slot].any():
                rows = (slots == slot).nonzero().flatten()
                delta = (x[rows] @ lora_a_stacked[slot, 0].T) @ lora_b_stacked[slot, 0].T
                y.index_add_(0, rows, delta.to(y.dtype), alpha=scale)


class GroupedLoraWorker(CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker with `GroupedLora`."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Name our class to vLLM, which asks its platform for one while the model is loaded."""
        name = f"{GroupedLora.__module__}.{GroupedLora.__qualname__}"
        current_platform.get_punica_wrapper = lambda: name
        super().load_model(*args, **kwargs)
