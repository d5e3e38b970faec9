"""A block's 4-bit layers unpacked together: bit by bit what bitsandbytes makes of each, and the same losses and gradients."""

import copy

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import LlamaConfig, LlamaForCausalLM

from configs.schema import LoraConfig
from tests.parts.test_train_model import VOCABULARY, assert_same, one_thread, rows, step, with_adapter  # noqa: F401
from train.model import insert_adapter
from train.rows import Padder
from train.unpacked import Packed, pack_by_block, unpacked_of

NUM_BLOCKS, LENGTHS = 3, (12, 5, 9)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


def llama() -> LlamaForCausalLM:
    """Of widths that bitsandbytes unpacks rightly on a CPU: not so rows of half a block, which it takes for another layout."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(attn_implementation="sdpa", use_cache=False, num_hidden_layers=NUM_BLOCKS, **sizes))


def in_four_bit(base, double: bool = True, dtype: torch.dtype = torch.float32, left: tuple[str, ...] = (), device: str = "cpu"):
    """Pack a base's layers, but for those of these names."""
    for block in base.model.layers:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, torch.nn.Linear) and not name.endswith(left):
                settings = {"quant_type": "nf4", "compress_statistics": double}
                packed = Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, **settings)
                packed.weight = Params4bit(layer.weight.data.to(dtype), requires_grad=False, **settings).to(device)
                block.set_submodule(name, packed)
    return base


def layers_of(base) -> list[Linear4bit]:
    return [layer for layer in base.modules() if isinstance(layer, Linear4bit)]


def as_it_is(layer) -> torch.Tensor:
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.fixture
def unpackings(monkeypatch) -> list[Packed]:
    found: list[Packed] = []
    unpack = Packed.unpack
    monkeypatch.setattr(Packed, "unpack", lambda self: found.append(self) or unpack(self))
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
def test_each_weight_is_bit_by_bit_what_bitsandbytes_makes_of_it(double, dtype, device):
    base = in_four_bit(llama(), double, dtype, device=device)
    before = [as_it_is(layer).clone() for layer in layers_of(base)]
    insert_adapter(base, LoraConfig(rank=2))
    pack_by_block(base.model.layers)
    for weight, layer in zip(before, layers_of(base), strict=True):
        assert layer.unpacked.take().dtype == dtype
        assert torch.equal(layer.unpacked.take(), weight)
        assert torch.equal(as_it_is(layer), weight), "and by itself too"


@pytest.mark.parametrize("recomputes", [False, True])
def test_losses_and_gradients_are_those_of_the_same_weights_in_full(recomputes, unpackings):
    packed = in_four_bit(llama())
    full = llama()
    plain = [layer for layer in full.model.modules() if isinstance(layer, torch.nn.Linear)]
    for mine, theirs in zip(layers_of(packed), plain, strict=True):
        theirs.weight.data = as_it_is(mine).clone()
    model, whole, batch = with_adapter(packed, gradient_checkpointing=recomputes), with_adapter(full), Padder(0)(rows(LENGTHS))
    for _ in range(2):
        assert_same(step(model, batch), step(whole, batch))
        model.zero_grad()
        whole.zero_grad()
    # There and back, but for those which lie there still: the last block's on the way back, and the first's on the next way there.
    assert len(unpackings) == 2 * 2 * (NUM_BLOCKS - 1) + 1


def test_another_adapter_on_the_base_finds_what_is_packed_and_a_copy_its_own(unpackings):
    base = in_four_bit(llama())
    insert_adapter(base, LoraConfig(rank=2))
    pack_by_block(base.model.layers)
    before = [layer.unpacked for layer in layers_of(base)]
    pack_by_block(base.model.layers)
    assert [layer.unpacked for layer in layers_of(base)] == before
    other = copy.deepcopy(base)
    for one, two in zip(layers_of(base), layers_of(other), strict=True):
        one.unpacked.take()
        assert torch.equal(one.unpacked.take(), two.unpacked.take())
        assert one.unpacked.take().data_ptr() != two.unpacked.take().data_ptr()


def test_what_has_no_adapter_or_is_of_another_kind_stays_as_it_is():
    base = in_four_bit(llama(), left=("down_proj",))
    insert_adapter(base, LoraConfig(rank=2, target_modules=["gate_proj", "up_proj", "down_proj"]))
    different = base.model.layers[0].mlp.gate_proj.get_base_layer()
    different.weight.quant_state.quant_type = "fp4"
    pack_by_block(base.model.layers)
    together = [name for name, layer in base.named_modules() if hasattr(layer, "unpacked")]
    assert {name.split(".")[2] for name in together} == {"1", "2"}, "none of a block whose layers differ"
    assert {name.split(".")[4] for name in together} == {"gate_proj", "up_proj"}


def test_with_dropout_pefts_own_layers_multiply_and_nothing_is_unpacked_together():
    base = in_four_bit(llama())
    with_adapter(base, dropout=0.1)
    assert not any(hasattr(layer, "unpacked") for layer in layers_of(base))


def test_a_weight_that_an_adapter_was_merged_into_is_the_one_that_counts():
    base = in_four_bit(llama())
    base.is_loaded_in_4bit = True  # by which PEFT takes its own layers for these
    merged, batch = with_adapter(base).merge_and_unload(), Padder(0)(rows(LENGTHS))
    whole = llama()
    plain = [layer for layer in whole.model.modules() if isinstance(layer, torch.nn.Linear)]
    for theirs, mine in zip(plain, layers_of(merged), strict=True):
        theirs.weight.data = as_it_is(mine).clone()
    assert_same(step(with_adapter(merged), batch), step(with_adapter(whole), batch))
    assert all(unpacked_of(layer) for layer in layers_of(merged)), "packed anew"
