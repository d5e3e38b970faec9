"""What `serve.gpu_lora` reads of a vLLM layer, without an engine: vLLM's own choice of adapters for each token, and random matrices."""

from types import SimpleNamespace
from typing import Any

import torch

MAX_TOKENS = 4096


def make_punica(slots: list[int], num_slots: int, device: str = "cuda") -> Any:
    """Make ours of vLLM's wrappers for a batch whose tokens have the adapters in these slots, or none (-1)."""
    from vllm.config.lora import LoRAConfig

    from serve.gpu_lora import BesidePunica

    punica = BesidePunica(MAX_TOKENS, MAX_TOKENS, device, lora_config=LoRAConfig(max_loras=num_slots, max_lora_rank=64))
    choose(punica, slots, num_slots)
    return punica


def choose(punica: Any, slots: list[int], num_slots: int) -> None:
    """Give a batch's tokens other adapters, where a CUDA graph has found those before."""
    from vllm.lora.layers import LoRAMapping

    names = tuple(slot + 1 for slot in slots)
    punica.update_metadata(LoRAMapping(names, names, is_prefill=True), [slot + 1 for slot in range(num_slots)], num_slots, 1024)


def make_layer(punica: Any, rank: int, width: int, outputs: tuple[int, ...], num_slots: int) -> Any:
    """Make a linear layer with so many adapters."""

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).mul_(0.05)

    weight = some(sum(outputs), width)
    return SimpleNamespace(
        punica_wrapper=punica,
        weight=weight,
        base_layer=None,
        output_slices=outputs,
        lora_a_stacked=tuple(some(num_slots, 1, rank, width) for _ in outputs),
        lora_b_stacked=tuple(some(num_slots, 1, each, rank) for each in outputs),
        _events=(torch.cuda.Event(), torch.cuda.Event()),
        _lora_stream=torch.cuda.Stream(),
        _get_quant_method=lambda: SimpleNamespace(apply=lambda _, x, bias: x @ weight.t()),
    )


def wanted(layer: Any, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
    """Return a layer's outputs in fp32, for each token with its own adapter."""
    found, begin, of_token = x.float() @ layer.weight.float().t(), 0, torch.tensor(slots, device=x.device)
    for a, b, width in zip(layer.lora_a_stacked, layer.lora_b_stacked, layer.output_slices, strict=True):
        for slot in range(len(a)):
            rows = (of_token == slot).nonzero().flatten()
            found[rows, begin : begin + width] += x[rows].float() @ a[slot, 0].float().t() @ b[slot, 0].float().t()
        begin += width
    return found
