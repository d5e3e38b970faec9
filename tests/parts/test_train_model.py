"""The adapter and its forward pass, on a tiny random Llama: the shortcuts change speed, and nothing else."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from configs.errors import ModelError
from configs.schema import LoraConfig, ModelConfig, TrainConfig
from data.template import NO_LOSS
from serve.adapters import BrokenAdapterError, check_adapter
from train.attention import ATTENTION, CAUSAL, attend_without_masks, lay_end_to_end
from train.model import add_adapter, has_logit_settings, load_base, packs_safely, pick_dtype
from train.rows import Packer, Padder, answer_places, fill_up, fill_up_packed

VOCABULARY, NUM_LAYERS, RANK = 128, 2, 4
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# Losses and gradients are sums over some tens of fp32 products, in another order: some units of fp32's seventh digit.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More threads only wait for each other on matrices of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": VOCABULARY, "num_hidden_layers": NUM_LAYERS}
    return LlamaForCausalLM(LlamaConfig(attn_implementation=attention, use_cache=False, **sizes))


def with_window(num_tokens: int) -> MistralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    config = MistralConfig(attn_implementation="sdpa", use_cache=False, num_hidden_layers=NUM_LAYERS, sliding_window=num_tokens, **sizes)
    return MistralForCausalLM(config)


def with_adapter(base=None, gradient_checkpointing: bool = False, compiles: bool = False, **lora):
    """Add an adapter whose matrices are all random: a fresh one's second matrix is zero, and hides most mistakes."""
    model = add_adapter(base or tiny(), LoraConfig(rank=RANK, **lora), gradient_checkpointing, compiles=compiles)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.normal_(std=0.2)
    return model.train()


def trained(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def rows(lengths=(12, 5, 9), seed: int = 0) -> list[dict[str, list[int]]]:
    """Make rows of which the last third carries loss, and one token in the middle."""
    torch.manual_seed(seed)
    made = []
    for length in lengths:
        tokens = torch.randint(VOCABULARY, (length,)).tolist()
        labels = [token if place >= length * 2 // 3 or place == 2 else NO_LOSS for place, token in enumerate(tokens)]
        made.append({"input_ids": tokens, "labels": labels})
    return made


def step(model, batch: dict[str, torch.Tensor], **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and the adapter's gradients of one batch."""
    model.zero_grad()
    loss = model(**batch, **inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in trained(model).items()}


def with_full_forward(model):
    """Return a copy whose base computes logits for every token, as transformers does."""
    full = copy.deepcopy(model)
    del full.get_base_model().forward
    return full


def assert_same(one, other, apart: float = 5e-4) -> None:
    """Losses are the same, and gradients but for roundings, of which a net of random weights makes more: sums of another order do that."""
    torch.testing.assert_close(one[0], other[0], **CLOSE)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        found = float((gradient - other[1][name]).norm() / other[1][name].norm())
        assert found < apart, f"{name}: {found}"


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(40)], ids=["mean", "of 7", "of 40"])
def test_logits_of_the_answers_alone_give_the_same_loss_and_gradients(num_items, gradient_checkpointing):
    model = with_adapter(gradient_checkpointing=gradient_checkpointing)
    batch = Padder(0)(rows())
    inputs = {} if num_items is None else {"num_items_in_batch": num_items}
    ours, full = step(model, batch, **inputs), step(with_full_forward(model), batch, **inputs)
    assert_same(ours, full)
    assert len(ours[1]) == NUM_LAYERS * len(LINEAR) * 2
    assert all(gradient.abs().max() > 0 for gradient in ours[1].values()), "each matrix learns"


@pytest.mark.parametrize("scale", [None, 0.5], ids=["plain", "changes its logits"])
def test_places_that_carry_no_loss_change_neither_loss_nor_gradients(scale):
    base = tiny()
    base.config.logit_scale = scale
    model, batch = with_adapter(base), fill_up(Padder(0)(rows()), (16,))
    exact, filled = (answer_places(batch["labels"], num_parts) for num_parts in (None, 2))
    assert len(filled) > len(exact)
    for inputs in ({}, {"num_items_in_batch": 40}):
        assert_same(step(model, {**batch, "answers": filled}, **inputs), step(model, {**batch, "answers": exact}, **inputs))


@pytest.mark.parametrize("scale", [None, 0.5], ids=["plain", "changes its logits"])
def test_smoothing_is_torchs_own_and_for_training_alone(scale):
    base = tiny()
    base.config.logit_scale = scale
    model = add_adapter(base, LoraConfig(rank=RANK), False, label_smoothing=0.2)
    batch = Padder(0)(rows())
    labels = batch["labels"]
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    for smoothing, training in ((0.2, True), (0.0, False)):
        model.train(training)
        with torch.no_grad():
            logits, loss = model(**inputs).logits, model(**batch).loss
        whole = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NO_LOSS, label_smoothing=smoothing)
        torch.testing.assert_close(loss, whole, **CLOSE)


def packing(base: LlamaForCausalLM | None = None) -> LlamaForCausalLM:
    base = base or tiny()
    lay_end_to_end(base)
    return base


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_learn_the_same_filled_up_packed_and_alone(attention):
    """Nothing masks what fills them up: it follows a row's end, and carries no loss."""
    batch = rows((12, 5, 9, 14))
    count = sum(label != NO_LOSS for row in batch for label in row["labels"][1:])
    model = with_adapter(tiny(attention))
    filled_up = step(model, Padder(3)(batch), num_items_in_batch=count)
    singly = [step(model, Padder(3)([row]), num_items_in_batch=count) for row in batch]
    total = sum(loss for loss, _ in singly), {name: sum(found[name] for _, found in singly) for name in filled_up[1]}
    assert_same(filled_up, total)
    assert_same(filled_up, step(with_adapter(packing()), Packer()(batch), num_items_in_batch=count))


@pytest.mark.parametrize("lengths", [(12, 5, 9, 14), (6, 6, 6), (70, 33)], ids=["of many lengths", "of one", "long ones"])
@pytest.mark.parametrize("make", [tiny, lambda: with_window(4)], ids=["all before", "a window"])
def test_packed_rows_learn_the_same_among_tokens_that_carry_no_loss(make, lengths):
    batch, model = rows(lengths), with_adapter(packing(make()))
    count = sum(label != NO_LOSS for row in batch for label in row["labels"][1:])
    packed, filled = Packer()(batch), fill_up_packed(Packer()(batch), max(lengths))
    assert filled["labels"].shape[1] >= packed["labels"].shape[1]
    filled["answers"] = answer_places(filled["labels"], 4)
    assert_same(step(model, filled, num_items_in_batch=count), step(model, packed, num_items_in_batch=count))


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("make", [tiny, lambda: with_window(4)], ids=["all before", "a window"])
def test_packing_is_as_transformers_own_masks_have_it(make, gradient_checkpointing):
    """Those tell rows apart by their positions, in a mask of all tokens by all."""
    batch = Packer()(rows())
    ours = step(with_adapter(packing(make()), gradient_checkpointing), batch)
    del batch["rows"]
    assert_same(ours, step(with_adapter(make()), batch))


@pytest.mark.parametrize("window", [None, 4])
def test_packed_conversations_are_blind_to_each_other(window):
    """The loss of the last row does not change with the rows before it; in a model whose attention reaches back only so far, neither."""
    base = tiny() if window is None else with_window(window)
    model, last = with_adapter(packing(base)), rows((8,), seed=5)[0]
    silent = [{**row, "labels": [NO_LOSS] * len(row["labels"])} for row in rows((8, 6))]
    losses = [step(model, Packer()([*before, last]))[0] for before in ([], silent, silent[1:], silent[::-1])]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], **CLOSE)


def of_kind(kind: str, **settings):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, use_cache=False, **ids, **sizes, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def test_a_model_whose_own_mask_lets_rows_see_each_other_is_refused():
    base = of_kind("doge")
    assert packs_safely(base), "nothing that it says of itself tells"
    assert not lay_end_to_end(base)


@pytest.mark.parametrize(
    ("kind", "settings", "by_ours"),
    [
        ("llama", {}, True),
        ("mistral", {"sliding_window": 4}, True),
        ("gemma2", {"sliding_window": 4, "head_dim": 8}, True),
        ("phimoe", {"num_local_experts": 2, "attention_dropout": 0.5}, True),
        ("phimoe", {"num_local_experts": 2, "sliding_window": 4}, False),
        ("nemotron", {}, False),
    ],
    ids=["llama", "a window", "windows in turn", "experts", "a window in the mask alone", "passes on nothing"],
)
def test_any_model_that_packs_keeps_rows_apart(kind, settings, by_ours):
    """Ours stands in where the model attends as it supposes; elsewhere transformers' own masks stay."""
    base = of_kind(kind, **settings)
    assert packs_safely(base)
    batch = rows((9, 6, 8))
    with torch.no_grad():
        alone = [base(**Padder(0)([row])).logits[0] for row in batch]
        assert lay_end_to_end(base)
        packed = base(**Packer()(batch)).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), **CLOSE)
    assert (base.config._attn_implementation == ATTENTION) is by_ours
    assert not base.training


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_compiled_blocks_learn_the_same_of_rows_of_any_length_and_packed(gradient_checkpointing):
    """Each new length is another shape; after the second, torch compiles for all."""
    ours, compiled = (with_adapter(gradient_checkpointing=gradient_checkpointing, compiles=compiles) for compiles in (False, True))
    for lengths in ((12, 5, 9), (7, 7), (14, 3), (11,)):
        assert_same(step(compiled, Padder(0)(rows(lengths))), step(ours, Padder(0)(rows(lengths))))
    ours, compiled = (with_adapter(packing(), gradient_checkpointing, compiles) for compiles in (False, True))
    for lengths in ((12, 5, 9), (7, 7), (14, 3), (11,)):
        assert_same(step(compiled, Packer()(rows(lengths))), step(ours, Packer()(rows(lengths))))
        with torch.no_grad():
            compiled.eval()(**Packer()(rows(lengths)))
        compiled.train()
    assert counters["frames"]["ok"] == counters["frames"]["total"], "none is left to run as it is"
    assert not counters["graph_break"]


def test_micro_batches_add_up_to_the_whole_batch():
    """With the batch's number of loss tokens each part is weighed as in the whole."""
    model, batch = with_adapter(), rows((12, 5, 9, 14))
    count = int((Padder(0)(batch)["labels"][:, 1:] != NO_LOSS).sum())
    whole = step(model, Padder(0)(batch))
    halves = [step(model, Padder(0)(half), num_items_in_batch=count) for half in (batch[:2], batch[2:])]
    assert_same(whole, (halves[0][0] + halves[1][0], {name: halves[0][1][name] + halves[1][1][name] for name in whole[1]}))


@pytest.mark.parametrize(
    ("make", "is_free"), [(tiny, True), (lambda: with_window(4), False), (lambda: with_window(12), True)], ids=["full", "near", "far"]
)
def test_a_model_without_masks_learns_the_same_and_one_with_a_window_within_its_rows_keeps_them(make, is_free):
    base, batch = make(), Padder(0)(rows((12, 5, 9)))
    assert attend_without_masks(base, 12) is is_free
    assert base.config._attn_implementation == (CAUSAL if is_free else "sdpa")
    assert_same(step(with_adapter(base), batch), step(with_adapter(make()), batch))


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_that_makes_something_else_of_tokens_without_its_masks_keeps_them(fails, monkeypatch):
    base = tiny()
    decoder, of_llama = base.model, type(base.model).forward

    def forward(**inputs):
        is_without = base.config._attn_implementation == CAUSAL
        if fails and is_without:
            raise AttributeError("'NoneType' object has no attribute 'shape'")
        found = of_llama(decoder, **inputs)
        found.last_hidden_state = found.last_hidden_state + 0.2 * is_without
        return found

    monkeypatch.setattr(decoder, "forward", forward)
    assert not attend_without_masks(base, 12)
    assert base.config._attn_implementation == "sdpa"


def test_without_labels_the_model_answers_in_full():
    model = with_adapter().eval()
    batch = Padder(0)(rows((6, 6)))
    del batch["labels"]
    with torch.no_grad():
        assert model(**batch).logits.shape == (2, 6, VOCABULARY)


def test_the_shortcut_touches_one_model_and_not_its_class():
    with_adapter()
    assert tiny().forward.__func__ is LlamaForCausalLM.forward
    assert "forward" not in tiny().__dict__


def test_a_model_that_changes_its_logits_has_its_own_changes_and_its_own_loss():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = CohereConfig(vocab_size=VOCABULARY, num_hidden_layers=NUM_LAYERS, logit_scale=0.5, use_cache=False, **sizes)
    model, batch = with_adapter(CohereForCausalLM(config)), Padder(0)(rows())
    assert has_logit_settings(model.get_base_model())
    assert_same(step(model, batch), step(with_full_forward(model), batch))


@pytest.mark.parametrize("make", [lambda: Padder(0)(rows()), lambda: Packer()(rows())], ids=["padded", "packed"])
def test_it_may_be_told_where_the_answers_are(make):
    base = tiny()
    lay_end_to_end(base)
    model, batch = with_adapter(base if "rows" in make() else tiny()), make()
    answers = answer_places(batch["labels"])
    assert batch["labels"].flatten()[answers + 1].tolist() == [label for label in batch["labels"].flatten().tolist() if label != NO_LOSS]
    assert_same(step(model, {**batch, "answers": answers}), step(model, batch), apart=1e-9)


def test_only_the_adapter_learns():
    model = with_adapter()
    assert all("lora_" in name for name in trained(model))
    assert {name.split(".")[-4] for name in trained(model)} == LINEAR


def test_named_layers_alone_get_an_adapter():
    assert {name.split(".")[-4] for name in trained(with_adapter(target_modules=["q_proj", "v_proj"]))} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_the_last_blocks_alone_get_an_adapter(targets):
    assert {name.split(".")[4] for name in trained(with_adapter(num_layers=1, target_modules=targets))} == {str(NUM_LAYERS - 1)}
    assert len(trained(with_adapter(num_layers=NUM_LAYERS))) == len(trained(with_adapter()))


def test_more_blocks_than_the_model_has_are_refused():
    with pytest.raises(ModelError, match="this model has") as refused:
        add_adapter(tiny(), LoraConfig(num_layers=NUM_LAYERS + 1), False)
    assert f"train.lora.num_layers={NUM_LAYERS}" in refused.value.remedy


def test_dropout_and_rank_stabilised_scale_reach_the_adapter():
    model = with_adapter(dropout=0.5, use_rslora=True, alpha=8)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_dropout["default"].p == 0.5
    assert layer.scaling["default"] == 8 / RANK**0.5


@pytest.mark.parametrize("names", [["query"], ["q_proj", "vproj"]], ids=["all wrong", "one wrong"])
def test_layers_that_are_not_there_are_refused_with_those_that_are(names):
    with pytest.raises(ModelError, match="target_modules") as refused:
        add_adapter(tiny(), LoraConfig(target_modules=names), False)
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in refused.value.remedy


@pytest.mark.parametrize(
    ("attention", "layer_types", "safe"),
    [
        ("sdpa", None, True),
        ("sdpa", ["full_attention", "sliding_attention"], True),
        ("sdpa", ["full_attention", "linear_attention"], False),
        ("sdpa", ["full_attention", "chunked_attention"], False),
        ("eager", None, False),
    ],
)
def test_packing_is_for_models_of_pure_attention_through_sdpa(attention, layer_types, safe):
    base = tiny(attention)
    if layer_types:
        base.config.layer_types = layer_types
    assert packs_safely(base) is safe


def test_the_number_format_is_what_the_config_says():
    assert pick_dtype(ModelConfig(precision="bf16")) == torch.bfloat16
    assert pick_dtype(ModelConfig(precision="fp32")) == torch.float32
    assert pick_dtype(ModelConfig()) in (torch.bfloat16, torch.float32)


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_base_is_loaded_in_the_format_asked_for_and_packs(precision, dtype, folder):
    base = load_base(folder, ModelConfig(name=str(folder), precision=precision), TrainConfig(packing=True), 64)
    assert base.dtype == dtype
    assert base.config.use_cache is False
    assert packs_safely(base)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it is SDPA always")
@pytest.mark.parametrize(("longest_tokens", "attention"), [(256, "eager"), (257, "sdpa")])
def test_short_rows_take_plain_attention_on_a_cpu(longest_tokens, attention, folder):
    base = load_base(folder, ModelConfig(name=str(folder), precision="fp32"), TrainConfig(), longest_tokens)
    assert base.config._attn_implementation == attention


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20])


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def other_shape(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))


BROKEN = {
    "weights cut short": cut_weights,
    "header cut short": cut_header,
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "one weight left out": without_a_weight,  # transformers would make it up at random
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config of another shape": other_shape,
    "config of an unknown kind": lambda folder: (folder / "config.json").write_text('{"model_type": "no_such_kind"}'),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_base_that_cannot_be_read_is_refused(name, folder):
    BROKEN[name](folder)
    with pytest.raises(ModelError, match="cannot load the base model") as refused:
        load_base(folder, ModelConfig(name=str(folder), precision="fp32"), TrainConfig(), 64)
    assert str(folder) in refused.value.what


def test_what_training_saves_is_what_serving_takes(tmp_path):
    with_adapter().save_pretrained(tmp_path / "adapter")
    check_adapter(tmp_path / "adapter", max_lora_rank=RANK)
    with pytest.raises(BrokenAdapterError, match=f"its rank is {RANK}"):
        check_adapter(tmp_path / "adapter", max_lora_rank=RANK - 1)
