"""Layers whose adapter is part of the base's product, against PEFT's own forward pass: the same numbers, and nothing of PEFT's lost."""

import copy

import pytest
import torch

from tests.parts.test_train_model import NUM_LAYERS, assert_same, one_thread, rows, step, tiny, trained, with_adapter  # noqa: F401
from tests.parts.test_train_unpacked import in_four_bit, llama
from train import fp8, fused
from train.fp8 import quantise_base
from train.frozen import frozen_of
from train.rows import Padder

NUM_FUSED = NUM_LAYERS * 7


def fused_layers(model) -> list:
    return [layer for layer in model.modules() if "forward" in vars(layer) and hasattr(layer, "lora_A")]


def as_peft(model):
    """Return a copy that PEFT computes."""
    plain = copy.deepcopy(model)
    for layer in fused_layers(plain):
        del layer.forward
    return plain


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("lora", [{}, {"alpha": 3, "use_rslora": True}], ids=["plain", "rslora"])
def test_losses_and_gradients_are_pefts(lora, gradient_checkpointing):
    model = with_adapter(gradient_checkpointing=gradient_checkpointing, **lora).double()
    assert len(fused_layers(model)) == NUM_FUSED
    batch = Padder(0)(rows())
    assert_same(step(model, batch), step(as_peft(model), batch), apart=1e-12)


def test_a_layer_with_a_bias_keeps_it():
    base = tiny()
    for block in base.model.layers:
        projection = block.mlp.down_proj
        projection.bias = torch.nn.Parameter(torch.randn(projection.out_features), requires_grad=False)
    model = with_adapter(base)
    batch = Padder(0)(rows())
    assert_same(step(model, batch), step(as_peft(model), batch))


def double_scales(model):
    for layer in fused_layers(model):
        layer.scaling = {name: 2 * scale for name, scale in layer.scaling.items()}


def replace_bases(model):
    for layer in fused_layers(model):
        weight = layer.base_layer.weight
        layer.base_layer.weight = torch.nn.Parameter(2 * weight.detach(), requires_grad=False)


def take_another_adapter(model):
    model.add_adapter("other", model.peft_config["default"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".other." in name:
                weight.normal_(0, 0.1)
    model.set_adapter("other")


@pytest.mark.parametrize("change", [double_scales, replace_bases, take_another_adapter])
def test_a_change_after_a_pass_is_in_the_next(change):
    model, batch = with_adapter().double(), Padder(0)(rows())
    before, _ = step(model, batch)
    change(model)
    found = step(model.double(), batch)
    assert_same(found, step(as_peft(model), batch), apart=1e-12)
    assert abs(float(found[0]) - float(before)) > 1e-4


def test_a_copy_made_after_a_pass_multiplies_by_its_own_base():
    model, batch = with_adapter(), Padder(0)(rows())
    step(model, batch)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in fused_layers(other):
            layer.base_layer.weight.zero_()
    assert_same(step(other, batch), step(as_peft(other), batch))


def test_a_model_brought_to_another_format_after_a_pass_multiplies_in_it():
    model, batch = with_adapter(tiny().bfloat16()), Padder(0)(rows())
    with torch.autocast("cpu", torch.bfloat16):
        step(model, batch)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, peft = step(model, batch), step(as_peft(model), batch)
    assert float(ours[0]) == pytest.approx(float(peft[0]), rel=0.01)


def test_dropout_is_left_to_peft():
    model = with_adapter(dropout=0.5)
    batch = Padder(0)(rows())
    torch.manual_seed(3)
    ours = step(model, batch)
    torch.manual_seed(3)
    assert_same(ours, step(as_peft(model), batch))


def test_an_adapter_can_be_switched_off_and_merged():
    model = with_adapter().eval()
    batch = {name: values for name, values in Padder(0)(rows()).items() if name != "labels"}
    with torch.no_grad():
        adapted = model(**batch).logits
        with model.disable_adapter():
            base = model(**batch).logits
        assert not torch.allclose(adapted, base)
        torch.testing.assert_close(model.merge_and_unload()(**batch).logits, adapted, rtol=1e-4, atol=1e-5)


def test_in_bf16_it_is_as_near_to_the_truth_as_pefts_sums():
    """Under autocast, as training goes; small matrices, since large ones make a net of which every rounding changes everything."""

    def make(base):
        model = with_adapter(base)
        with torch.no_grad():
            for matrix in trained(model).values():
                matrix.mul_(0.25)
        return model

    batch = Padder(0)(rows((60, 40, 50)))
    right, gradients = step(make(tiny().bfloat16().float()), batch)
    model = make(tiny().bfloat16())
    for candidate in (model, as_peft(model)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, found = step(candidate, batch)
        assert abs(float(loss - right)) < 1e-3
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32
            assert (gradient - gradients[name]).norm() < 0.04 * gradients[name].norm(), name


def test_a_base_with_a_product_of_its_own_is_added_to():
    class Doubled(torch.nn.Linear):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(values)

    base = tiny()
    for block in base.model.layers:
        doubled = Doubled(block.mlp.up_proj.in_features, block.mlp.up_proj.out_features, bias=False)
        doubled.weight = block.mlp.up_proj.weight
        block.mlp.up_proj = doubled
    model = with_adapter(base)
    batch = Padder(0)(rows())
    assert_same(step(model, batch), step(as_peft(model), batch))


def in_fp8(base):
    quantise_base(base)
    return base


@pytest.mark.parametrize("frozen", [lambda base: in_four_bit(llama()), in_fp8], ids=["nf4", "fp8"])
def test_a_frozen_base_of_fewer_bits_has_the_numbers_of_its_own_product(frozen, monkeypatch):
    model = with_adapter(frozen(tiny()))
    batch = Padder(0)(rows())
    asked = []
    monkeypatch.setattr(fused, "frozen_of", lambda *arguments: asked.append(frozen_of(*arguments)) or asked[-1])
    ours = step(model, batch)
    assert len(asked) == len(fused_layers(model))
    assert all(asked), "none is left to the layer"
    assert_same(ours, step(as_peft(model), batch))


def in_bf16(make):
    """A model whose base is in bf16, as on a GPU, and its adapter in fp32; smaller matrices, for roundings change much in a random net."""
    model = make(tiny().bfloat16())
    with torch.no_grad():
        for matrix in trained(model).values():
            matrix.data = matrix.float() * 0.25
    return model


def step_in_bf16(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return step(model, batch)


def assert_near(one, other) -> None:
    assert abs(float(one[0] - other[0])) < 2e-3
    for name, gradient in one[1].items():
        assert (gradient - other[1][name]).norm() < 0.08 * other[1][name].norm(), name


def test_a_change_that_torch_is_not_told_of_is_in_the_next_pass():
    """As optimizers make it that write to memory by themselves."""
    model, batch = in_bf16(with_adapter), Padder(0)(rows())
    step_in_bf16(model, batch)
    for matrix in trained(model).values():
        version = matrix._version
        matrix.data.mul_(1.5)
        assert matrix._version == version
    assert_near(step_in_bf16(model, batch), step_in_bf16(as_peft(model), batch))


def test_a_change_is_in_a_block_that_is_asked_by_itself():
    model, batch = in_bf16(with_adapter), Padder(0)(rows())
    step_in_bf16(model, batch)
    with torch.no_grad():
        for matrix in trained(model).values():
            matrix.mul_(1.5)
    values, mlps = torch.randn(2, 5, 32), [each.get_base_model().model.layers[0].mlp for each in (model, as_peft(model))]
    with torch.autocast("cpu", torch.bfloat16):
        ours, pefts = (mlp(values.bfloat16()).float() for mlp in mlps)
    assert (ours - pefts).norm() < 0.02 * pefts.norm()


def test_an_evaluation_in_inference_mode_may_come_first():
    model, batch = in_bf16(with_adapter), Padder(0)(rows())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    assert_near(step_in_bf16(model, batch), step_in_bf16(as_peft(model), batch))


def test_a_pass_in_full_between_those_in_bf16_has_its_own_matrices():
    model, batch = in_bf16(with_adapter), Padder(0)(rows())
    found = [step_in_bf16(model, batch)]
    whole = copy.deepcopy(model).float()
    assert_same(step(whole, batch), step(as_peft(whole), batch))
    found += [step_in_bf16(model, batch), step_in_bf16(whole.bfloat16(), batch)]
    for each in found[1:]:
        assert_near(found[0], each)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["up_proj", "down_proj"]])
def test_layers_whose_siblings_have_no_adapter_are_multiplied_alone(targets):
    model, batch = with_adapter(target_modules=targets), Padder(0)(rows())
    assert len(fused_layers(model)) == 2 * NUM_LAYERS
    assert_same(step(model, batch), step(as_peft(model), batch))


def test_siblings_of_which_one_is_in_another_format_are_multiplied_alone():
    base = llama()
    for block in in_four_bit(base, left=("q_proj", "v_proj", "up_proj", "o_proj", "down_proj")).model.layers:
        assert type(block.self_attn.k_proj) is not type(block.self_attn.q_proj)
    model, batch = with_adapter(base), Padder(0)(rows())
    assert_same(step(model, batch), step(as_peft(model), batch))


def test_values_that_several_layers_in_fp8_read_are_quantised_once(monkeypatch):
    model, batch, widths = with_adapter(in_fp8(tiny())), Padder(0)(rows()), []
    quantise = fp8._quantise
    monkeypatch.setattr(fp8, "_quantise", lambda values: widths.append(values.shape) or quantise(values))
    loss = model(**batch).loss
    assert len(widths) == 4 * NUM_LAYERS, "before attention and after it, before the gate and after it"
    loss.backward()
    assert len(widths) == (4 + 7) * NUM_LAYERS - 3, "nothing learns before the first block, whose first layers want no gradient"


def test_nothing_is_kept_of_a_pass():
    model = with_adapter()
    step(model, Padder(0)(rows()))
    for layer in fused_layers(model):
        siblings, _ = layer.siblings
        assert siblings._read is None
        assert not siblings._waiting


def test_siblings_that_are_asked_otherwise_are_asked_alone():
    """As in attention to other tokens; and no product waits for one that does not come."""
    model = with_adapter().double()
    attention, other = (each.get_base_model().model.layers[0].self_attn for each in (model, as_peft(model)))
    one, two = torch.randn(2, 5, 32).double(), torch.randn(2, 7, 32).double()
    for names, values in ((("q_proj", "k_proj", "v_proj"), (one, two, two)), (("v_proj", "k_proj", "q_proj"), (one, one, one))) * 2:
        for name, value in zip(names, values, strict=True):
            torch.testing.assert_close(getattr(attention, name)(value), getattr(other, name)(value))
    siblings, _ = attention.q_proj.siblings
    assert not siblings.are_together
    assert siblings._read is None


def test_a_product_that_waits_is_not_given_where_the_adapter_was_switched_off():
    model = with_adapter()
    attention, values = model.get_base_model().model.layers[0].self_attn, torch.randn(2, 5, 32)
    attention.q_proj(values)
    with model.disable_adapter():
        assert torch.equal(attention.k_proj(values), attention.k_proj.get_base_layer()(values))
