"""Adapters beside a base's product on a real GPU: each token gets its adapter's share, by vLLM's own kernels; skipped without a GPU."""

import pytest
import torch

from cluster.cards import find_gpus
from tests.helpers.lora import choose, make_layer, make_punica, wanted

pytestmark = pytest.mark.skipif(not find_gpus(), reason="this machine has no GPU")
NUM_SLOTS, WIDTH, OUTPUTS = 4, 512, (768, 256, 256)
BATCHES = {"none": (-1,), "one": (2,), "all": (0, 1, 2, 3), "one and none": (-1, 3), "all and none": (-1, 0, 1, 2, 3)}


@pytest.fixture(autouse=True)
def put_in(monkeypatch):
    """Ours in vLLM's place, for a test."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

    from serve.gpu_lora import put_in

    monkeypatch.setattr(BaseLinearLayerWithLoRA, "_apply_async_impl", None)  # so that all comes back
    for kernels in (lora_expand_op, lora_shrink_op):
        monkeypatch.setattr(kernels, "get_lora_op_configs", kernels.get_lora_op_configs)
    put_in()
    torch.manual_seed(0)


def of_tokens(adapters: tuple[int, ...], num_tokens: int) -> list[int]:
    return [adapters[token % len(adapters)] for token in range(num_tokens)]


def assert_right(found: torch.Tensor, right: torch.Tensor) -> None:
    """For each token by itself: one that lost its adapter would hide among the others."""
    apart = (found.float() - right).norm(dim=1) / right.norm(dim=1)
    assert float(apart.max()) < 0.02


@pytest.mark.parametrize("rank", [8, 16, 64])
@pytest.mark.parametrize("adapters", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("num_tokens", [1, 40, 200, 700])
def test_each_token_has_its_adapters_share(num_tokens, adapters, rank):
    from serve.gpu_lora import apply_beside

    slots = of_tokens(adapters, num_tokens)
    layer = make_layer(make_punica(slots, NUM_SLOTS), rank, WIDTH, OUTPUTS, NUM_SLOTS)
    x = torch.randn(num_tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    assert_right(apply_beside(layer, x), wanted(layer, x, slots))
    assert_right(apply_beside(layer, x[None])[0], wanted(layer, x, slots))


@pytest.mark.parametrize(
    "adapters", [batch for name, batch in BATCHES.items() if name != "none"], ids=[name for name in BATCHES if name != "none"]
)
def test_a_graph_that_was_captured_with_one_adapter_serves_any(adapters):
    from serve.gpu_lora import apply_beside

    num_tokens, x = 48, torch.randn(48, WIDTH, device="cuda", dtype=torch.bfloat16)
    punica = make_punica(of_tokens((2,), num_tokens), NUM_SLOTS)
    layer = make_layer(punica, 16, WIDTH, OUTPUTS, NUM_SLOTS)
    apply_beside(layer, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = apply_beside(layer, x)
    slots = of_tokens(adapters, num_tokens)
    choose(punica, slots, NUM_SLOTS)
    graph.replay()
    assert_right(outputs, wanted(layer, x, slots))
