"""Adapters beside a base's product on a real GPU: each token gets its adapter's share, by vLLM's own kernels; skipped without a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.cards import find_gpus

pytestmark = pytest.mark.skipif(not find_gpus(), reason="this machine has no GPU")
SLOTS, WIDTH, OUTPUTS = 4, 512, (768, 256, 256)


class Punica:
    """vLLM's kernels, and which token has which adapter."""

    def __init__(self, slots: torch.Tensor) -> None:
        from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

        self.token_mapping_meta = LoRAKernelMeta.make(SLOTS, 4096, "cuda", [1, 2, 4, 5])
        self.token_mapping_meta.prepare_tensors(slots)

    def add_shrink(self, y: torch.Tensor, x: torch.Tensor, a: tuple[torch.Tensor, ...], scale: float) -> None:
        from vllm.lora.ops.triton_ops.lora_shrink_op import _lora_shrink

        _lora_shrink(x, a, y, *self.token_mapping_meta.meta_args(len(x), True), scale)

    def add_expand(self, y: torch.Tensor, x: torch.Tensor, b: tuple[torch.Tensor, ...], widths: tuple[int, ...], add_inputs: bool) -> None:
        from vllm.lora.ops.triton_ops.lora_expand_op import _lora_expand

        _lora_expand(x, b, y, *self.token_mapping_meta.meta_args(x.shape[1], True), offset_start=0, add_inputs=add_inputs)


def make_layer(rank: int, slots: torch.Tensor, width: int = WIDTH, outputs: tuple[int, ...] = OUTPUTS, num_slots: int = SLOTS) -> Any:
    """Make what `apply_beside` reads of a vLLM layer."""

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).mul_(0.05)

    weight = some(sum(outputs), width)
    return SimpleNamespace(
        punica_wrapper=Punica(slots),
        weight=weight,
        base_layer=None,
        output_slices=outputs,
        lora_a_stacked=tuple(some(num_slots, 1, rank, width) for _ in outputs),
        lora_b_stacked=tuple(some(num_slots, 1, each, rank) for each in outputs),
        _events=(torch.cuda.Event(), torch.cuda.Event()),
        _lora_stream=torch.cuda.Stream(),
        _get_quant_method=lambda: SimpleNamespace(apply=lambda _, x, bias: x @ weight.t()),
    )


def wanted(layer: Any, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The same in fp32, token by token's adapter."""
    found = x.float() @ layer.weight.float().t()
    begin = 0
    for a, b, width in zip(layer.lora_a_stacked, layer.lora_b_stacked, layer.output_slices, strict=True):
        for slot in range(len(a)):
            rows = (slots == slot).nonzero().flatten()
            found[rows, begin : begin + width] += x[rows].float() @ a[slot, 0].float().t() @ b[slot, 0].float().t()
        begin += width
    return found


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("adapters", [(-1,), (2,), (0, 1, 2, 3), (-1, 3)], ids=["none", "one", "all", "one and none"])
@pytest.mark.parametrize("num_tokens", [1, 40, 200, 700])
def test_each_token_has_its_adapters_share(num_tokens, adapters, rank, monkeypatch):
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

    from serve.gpu_lora import apply_beside, put_in

    monkeypatch.setattr(BaseLinearLayerWithLoRA, "_apply_async_impl", None)  # so that all comes back
    for kernels in (lora_expand_op, lora_shrink_op):
        monkeypatch.setattr(kernels, "get_lora_op_configs", kernels.get_lora_op_configs)
    put_in()
    torch.manual_seed(0)
    slots = torch.tensor(adapters, dtype=torch.int32, device="cuda").repeat(num_tokens)[:num_tokens]
    layer, x = make_layer(rank, slots), torch.randn(num_tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    found, right = apply_beside(layer, x).float(), wanted(layer, x, slots)
    assert float((found - right).norm() / right.norm()) < 0.01
    torch.testing.assert_close(apply_beside(layer, x[None])[0].float(), found, rtol=0.02, atol=0.02)  # a batch's dimension changes nothing
