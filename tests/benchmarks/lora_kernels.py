"""What one and eight adapters cost an 8B block on a GPU, ours (`serve.gpu_lora`) beside vLLM's own way, without an engine.

`PYTHONPATH=. python tests/benchmarks/lora_kernels.py`
Microseconds beyond the block's own products, as CUDA graphs where a batch has no more than 512 tokens, as an engine has them; more tokens
than that are kernels that are asked for one by one. `adapters.py` measures what a user gets.
"""

import os
from collections.abc import Callable
from typing import Any

os.environ["VLLM_LORA_DISABLE_PDL"] = "1"  # as Tandem's engine; it is read when vLLM is imported

import torch
from bench import SHAPES, write_result
from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op, utils

from configs.cli import console
from serve import gpu_lora
from tests.helpers.lora import choose, make_layer, make_punica

NUM_SLOTS, NUM_BLOCKS, NUM_ROUNDS = 8, 3, 20
BATCHES, RANKS, ADAPTERS = (1, 64, 256, 2048), (16, 64), (1, 8)


def layers_of(shape: str) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return inputs and outputs of a block's linear layers, as vLLM joins them."""
    sizes = SHAPES[shape]
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    narrow = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    return {"qkv": (width, (width, narrow, narrow)), "o": (width, (width,)), "gate_up": (width, (inner, inner)), "down": (inner, (width,))}


def as_vllm(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return outputs as vLLM's layer makes them."""
    outputs = x @ layer.weight.t()
    rank = layer.lora_b_stacked[0].shape[-1]
    inner = torch.empty(len(layer.output_slices), len(x), rank, dtype=torch.float32, device=x.device)
    which = layer.punica_wrapper.token_mapping_meta.meta_args(len(x), False)
    lora_shrink_op._lora_shrink(x, layer.lora_a_stacked, inner, *which, 1.0)
    lora_expand_op._lora_expand(inner, layer.lora_b_stacked, outputs, *which, offset_start=0, add_inputs=True)
    return outputs


def block_us(run: Callable[[], Any], as_graph: bool) -> float:
    """Return the microseconds that a block takes of the GPU."""
    run()
    torch.cuda.synchronize()
    if as_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    for _ in range(3):
        run()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(NUM_ROUNDS):
        run()
    ended.record()
    torch.cuda.synchronize()
    return float(began.elapsed_time(ended)) * 1000 / NUM_ROUNDS / NUM_BLOCKS


def main() -> None:
    """Measure both ways for all batches, and write the result."""
    punica = make_punica([0], NUM_SLOTS)
    own_sizes = lora_shrink_op.get_lora_op_configs
    layers, figures = layers_of("8b"), {}
    for rank in RANKS:
        utils._LORA_A_PTR_DICT.clear()
        utils._LORA_B_PTR_DICT.clear()
        blocks = [{name: make_layer(punica, rank, *sizes, NUM_SLOTS) for name, sizes in layers.items()} for _ in range(NUM_BLOCKS)]
        for num_tokens in BATCHES:
            inputs = {name: torch.randn(num_tokens, width, device="cuda", dtype=torch.bfloat16) for name, (width, _) in layers.items()}

            def each(way: Callable[[Any, torch.Tensor], Any], blocks: Any = blocks, inputs: Any = inputs) -> Callable[[], Any]:
                return lambda: [way(layer, inputs[name]) for block in blocks for name, layer in block.items()]

            as_graph = num_tokens <= gpu_lora.MAX_BESIDE_TOKENS
            base_us = figures[f"base_{num_tokens}_tokens_us"] = block_us(each(lambda layer, x: x @ layer.weight.t()), as_graph)
            for num_adapters in (number for number in ADAPTERS if number <= num_tokens):
                choose(punica, [token % num_adapters for token in range(num_tokens)], NUM_SLOTS)
                name = f"rank_{rank}_{num_tokens}_tokens_{num_adapters}_adapters"
                for kernels in (lora_shrink_op, lora_expand_op):
                    kernels.get_lora_op_configs = own_sizes
                figures[f"vllm_{name}_us"] = block_us(each(as_vllm), as_graph) - base_us
                gpu_lora.put_in()
                figures[f"ours_{name}_us"] = block_us(each(gpu_lora.apply_beside), as_graph) - base_us
                console.print(f"{name}: vLLM {figures[f'vllm_{name}_us']:.1f}, ours {figures[f'ours_{name}_us']:.1f} us a block")
    write_result("lora-kernels", figures, {"shape": "8b", "slots": NUM_SLOTS, "blocks": NUM_BLOCKS})


if __name__ == "__main__":
    main()
