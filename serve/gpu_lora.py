"""Adapters on a GPU's engine: their first product beside the base's, and kernels of sizes that suit the work.

vLLM adds an adapter's share to each linear layer by two kernels after the base's product. Here the first of them, which needs the layer's
input alone, runs beside that product; where a prompt is long and all of its batch's tokens are one adapter's, both are plain products; and
the kernels' sizes are those that were quickest on an H200 (results/lora-kernels-h200-*). Without an adapter nothing is added.
Knows vLLM's LoRA layers and its GPU worker. Imported by the engine's own process alone, by the name that `serve.engine` gives it.
"""

import os
from typing import Any

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.platforms import current_platform
from vllm.utils.multi_stream_utils import maybe_execute_in_parallel
from vllm.v1.worker.gpu_worker import Worker

MAX_BESIDE_TOKENS = 512  # of a batch: the products of more fill a GPU by themselves, and CUDA graphs end here too
FEW_TOKENS = 128  # of a batch that answers, and reads no prompt
MAX_TUNED_RANK = 64
MIN_DOT = 16  # of a kernel's products, along what is summed
HOPPER = (9, 0)


class BesidePunica(PunicaWrapperGPU):  # type: ignore[misc]
    """vLLM's choice of adapters for a batch, which also knows whether all of its tokens have the same one."""

    has_one = False

    def update_metadata(self, mapping: Any, *args: Any, **kwargs: Any) -> None:
        """Look at the batch's adapters where the host has them; 0 stands for none."""
        super().update_metadata(mapping, *args, **kwargs)
        adapters = set(mapping.index_mapping)
        self.has_one = len(adapters) == 1 and adapters != {0}


def apply_beside(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return a linear layer's outputs with its adapters' share, (..., outputs) for x (..., inputs); in the place of vLLM's own method."""
    punica = layer.punica_wrapper
    which, flat = punica.token_mapping_meta, x.reshape(-1, x.shape[-1])

    def of_base() -> torch.Tensor:
        product: torch.Tensor = layer._get_quant_method().apply(layer.base_layer, x, bias)
        return product

    if which.no_lora_flag_cpu.item():
        return of_base()
    num_tokens, rank = len(flat), layer.lora_b_stacked[0].shape[-1]
    if num_tokens > MAX_BESIDE_TOKENS and punica.has_one:
        outputs = of_base()
        add_one_adapter(outputs.view(num_tokens, -1), flat, layer, which.active_lora_ids[:1])
        return outputs
    inner = torch.empty(len(layer.output_slices), num_tokens, rank, dtype=torch.float32, device=x.device)

    def of_adapters() -> None:
        punica.add_shrink(inner, flat, layer.lora_a_stacked, 1.0)

    aside = layer._lora_stream if num_tokens <= MAX_BESIDE_TOKENS else None
    outputs, _ = maybe_execute_in_parallel(of_base, of_adapters, *layer._events, aside)
    punica.add_expand(outputs.view(num_tokens, -1), inner, layer.lora_b_stacked, layer.output_slices, add_inputs=True)
    return outputs


def add_one_adapter(outputs: torch.Tensor, x: torch.Tensor, layer: Any, slot: torch.Tensor) -> None:
    """Add to outputs (tokens, outputs) the share of the one adapter that all tokens x (tokens, inputs) have; slot (1,) is on the GPU."""
    begin = 0
    for a, b, width in zip(layer.lora_a_stacked, layer.lora_b_stacked, layer.output_slices, strict=True):
        down, up = a.index_select(0, slot)[0, 0], b.index_select(0, slot)[0, 0]  # (rank, inputs), (width, rank)
        outputs[:, begin : begin + width].addmm_(x @ down.t(), up.t())
        begin += width


def kernel_sizes(op_type: str, batch: int, hidden_size: int, rank: int) -> dict[str, int | None]:
    """Return the sizes of a kernel's blocks; vLLM's share a product's inputs among more blocks than there is work for."""
    shared: dict[str, int | None] = {"num_warps": 4, "num_ctas": 1, "num_stages": 2, "max_nreg": None}
    if op_type == "shrink" and batch < FEW_TOKENS:
        return shared | {"block_m": 16, "block_n": 16, "block_k": 256, "split_k": min(64, -(-hidden_size // 256)), "group_size_m": 8}
    if op_type == "shrink":
        return shared | {"block_m": 64, "block_n": 16, "block_k": 128, "split_k": 8, "group_size_m": 8, "num_stages": 3}
    block_k = max(MIN_DOT, min(32, rank))
    if batch < FEW_TOKENS:
        return shared | {"block_m": 16, "block_n": 256 if hidden_size > 8192 else 128, "block_k": block_k}
    return shared | {"block_m": 64, "block_n": 128, "block_k": block_k}


def _tuned(of_vllm: Any) -> Any:
    def sizes(op_type: str, max_loras: int, batch: int, hidden_size: int, rank: int, *others: Any, **named: Any) -> Any:
        if op_type in ("shrink", "expand") and rank <= MAX_TUNED_RANK:
            return kernel_sizes(op_type, batch, hidden_size, rank)
        return of_vllm(op_type, max_loras, batch, hidden_size, rank, *others, **named)

    sizes.is_tuned = True  # type: ignore[attr-defined]
    return sizes


def put_in() -> None:
    """Have vLLM's LoRA layers use what is here, and its kernels on Hopper alone, unless somebody names sizes of his own."""
    BaseLinearLayerWithLoRA._apply_async_impl = apply_beside
    if torch.cuda.get_device_capability() != HOPPER or os.environ.get("VLLM_TUNED_CONFIG_FOLDER"):
        return
    for kernels in (lora_shrink_op, lora_expand_op):
        if not hasattr(kernels.get_lora_op_configs, "is_tuned"):
            kernels.get_lora_op_configs = _tuned(kernels.get_lora_op_configs)


class BesideLoraWorker(Worker):  # type: ignore[misc]
    """vLLM's GPU worker with `apply_beside`."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Put ours in before there are layers; vLLM asks its platform for the class while the model is loaded."""
        put_in()
        name = f"{BesidePunica.__module__}.{BesidePunica.__qualname__}"
        current_platform.get_punica_wrapper = lambda: name
        super().load_model(*args, **kwargs)
