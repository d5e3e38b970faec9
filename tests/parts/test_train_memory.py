"""The memory model against torch itself: adapters as PEFT makes them, and what autograd really keeps of a step on a CPU."""

import pytest
import torch

from cluster.memory import Device, Rows, Step
from cluster.shape import read_shape
from configs.schema import ChatbotConfig, LoraConfig
from data.template import NO_LOSS
from train.attention import lay_end_to_end
from train.model import add_adapter
from train.probe import make_base, make_rows, run_steps
from train.rows import Packer, Padder

MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "tie_word_embeddings": True,
}
SHAPE = read_shape(MODEL, "tiny")
CLOSE = 0.06


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_config(precision: str = "fp32", **train) -> ChatbotConfig:
    train = {"batch_size": 2, "micro_batch_size": 2, "gradient_checkpointing": False, **train}
    data = {"source": "x", "max_length_tokens": 2048}
    return ChatbotConfig.model_validate({"name": "b", "model": {"precision": precision}, "data": data, "train": train})


@pytest.mark.parametrize(
    "settings", [{}, {"target_modules": ["q_proj", "down_proj"]}, {"num_layers": 3}, {"rank": 5}], ids=["all", "two", "last", "odd"]
)
def test_an_adapter_has_as_many_weights_as_the_plan_says(settings):
    lora = LoraConfig(**settings)
    model = add_adapter(make_base(MODEL, make_config(), 32), lora, gradient_checkpointing=False)
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == SHAPE.num_adapter_weights(lora)
    assert sum(weight.numel() for weight in model.parameters() if not weight.requires_grad) == SHAPE.num_weights


def kept_bytes(config: ChatbotConfig, length: int, lengths: tuple[int, ...]) -> int:
    """Take a forward pass, and add up what autograd keeps of it beside weights, each piece of memory once."""
    base = make_base(MODEL, config, length)
    if config.train.packing:
        lay_end_to_end(base)
    model = add_adapter(base, config.train.lora, config.train.gradient_checkpointing is True)
    model.train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    rows = make_rows(lengths, len(lengths), MODEL["vocab_size"])
    for row in rows:  # one token of each carries loss: the logits are no part of this
        row["labels"] = [NO_LOSS] * (len(row["labels"]) - 1) + row["labels"][-1:]
    batch = (Packer() if config.train.packing else Padder(0))(rows)
    bf16 = config.model.precision == "bf16"
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(**batch)
    return sum(kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("length", "equal", "train"),
    [
        (512, True, {}),
        (512, False, {}),
        (128, False, {}),
        (512, True, {"packing": True}),
        (512, False, {"packing": True}),
        (512, True, {"lora": {"dropout": 0.1}}),
        (512, True, {"lora": {"target_modules": ["gate_proj", "up_proj", "down_proj"]}}),
        (512, True, {"lora": {"num_layers": 4}}),
    ],
    ids=["equal", "padded", "plain attention", "packed", "packed of two lengths", "dropout", "MLP", "last blocks"],
)
def test_a_step_keeps_what_the_plan_says(precision, length, equal, train):
    config = make_config(precision, **train)
    lengths = (length, length if equal else length - 20)
    step = Step(SHAPE, config.train, Rows(length, 1), Device(on_gpu=False, value_bytes=2 if precision == "bf16" else 4))
    assert step._kept_bytes() == pytest.approx(kept_bytes(config, length, lengths), rel=CLOSE)


def test_a_probe_leaves_the_base_as_it_was():
    config = make_config(learning_rate=1e-3)
    base = make_base(MODEL, config, 32)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    found = [run_steps(base, config, make_rows((32, 30), 8, MODEL["vocab_size"]), num_steps=1) for _ in range(2)]
    assert all(figures.tokens_per_s > 0 and figures.taken_gib > 0 for figures in found)
    assert set(base.state_dict()) == set(before)
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())
    assert "forward" not in vars(base)
