"""What of a GPU's adapters can be seen without one: which batches have one adapter alone, and the kernels' sizes."""

import pytest
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.punica_wrapper import punica_gpu

from serve.gpu_lora import kernel_sizes
from tests.helpers.lora import choose, make_punica


@pytest.mark.parametrize(
    ("slots", "has_one"), [([1, 1, 1], True), ([0], True), ([-1, -1], False), ([-1, 1], False), ([0, 1], False), ([-1], False)]
)
def test_a_batch_has_one_adapter_where_all_tokens_have_the_same(slots, has_one, monkeypatch):
    monkeypatch.setattr(punica_gpu, "LoRAKernelMeta", LoRAKernelMeta, raising=False)  # vLLM imports it where there is Triton
    punica = make_punica([1, 1], num_slots=4, device="cpu")
    choose(punica, slots, 4)
    assert punica.has_one is has_one
    assert punica.token_mapping_meta.no_lora_flag_cpu.item() == (set(slots) == {-1})


@pytest.mark.parametrize("rank", [8, 16, 32, 64])
@pytest.mark.parametrize("batch", [1, 64, 128, 4096])
@pytest.mark.parametrize("width", [576, 4096, 14336])
def test_blocks_have_work_and_are_as_large_as_a_product_must_be(width, batch, rank):
    shrink, expand = (kernel_sizes(kind, batch, width, rank) for kind in ("shrink", "expand"))
    assert shrink["block_k"] * (shrink["split_k"] - 1) < max(width, 1024), "no share of the inputs is empty in a wide layer"
    assert expand["block_k"] >= 16
    assert {"block_m", "block_n", "block_k", "num_warps", "num_stages"} <= set(shrink) & set(expand)
