"""Layers in FP8 against those in bf16: products, gradients, a run; and what is refused. On a CPU, which has the numbers and no speed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from cluster.cards import find_gpus
from cluster.registry import Version
from configs.errors import ClusterError, ModelError
from configs.schema import ChatbotConfig, LoraConfig, ModelConfig, TrainConfig
from data.template import NO_LOSS
from serve.adapters import check_adapter
from tests.parts.test_train_model import LINEAR, assert_same, rows, step, tiny, with_adapter
from tests.parts.test_train_shared import config as shared_config
from tests.parts.test_train_shared import steps
from tests.parts.test_train_step import one_thread  # noqa: F401 (a fixture)
from train.evaluate import FP8_BY_ROWS, trained_on
from train.fp8 import LARGEST, SMALLEST_ROW, Float8Linear, quantise_base, quantise_rows
from train.group import Group, why_apart
from train.model import add_adapter, load_base
from train.probe import make_base, make_rows, run_steps
from train.rows import Padder, RowOrder
from train.shared import SharedBase
from train.step import OrderedTrainer, training_arguments

# Each factor has three binary digits behind its first, and is off by up to 1/16, by 2.5 % on average; so a product of many is by 3.5 %.
ERROR, ERROR_OF_A_TOKEN = 0.04, 0.06
NUM_STEPS, RATE, VOCABULARY = 30, 1e-3, 128
on_no_older_gpu = pytest.mark.skipif(not all(gpu.has_fp8 for gpu in find_gpus()), reason="a GPU here has no FP8")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


def chain(first: int, length: int) -> dict[str, list[int]]:
    """Make a row in which each token tells the next, of 16 of the vocabulary's: something to learn in some steps."""
    tokens = [first]
    while len(tokens) < length:
        tokens.append((tokens[-1] * 3 + 1) % 16)
    return {"input_ids": tokens, "labels": [NO_LOSS, *tokens[1:]]}


ROWS = [chain(place * 7 % 16, 6 + place * 5 % 17) for place in range(24)]


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())


def layer(inputs: int = 256, outputs: int = 512, bias: bool = False) -> torch.nn.Linear:
    torch.manual_seed(0)
    made = torch.nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    made.weight.mul_(torch.logspace(-2, 2, outputs)[:, None])  # outputs of all sizes, each with its own scale
    return made


def pass_through(layer: torch.nn.Module, values: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = values.clone().requires_grad_()
    found = layer(values)
    found.backward(gradient)
    return found.detach(), values.grad


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it is the GPU's turn")),
        pytest.param("cuda", marks=[on_a_gpu, on_no_older_gpu]),
    ],
)
@pytest.mark.parametrize("size", [1.0, 1e-9], ids=["ones", "tiny"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_products_and_gradients_are_those_of_bf16(bias, size, device):
    plain = layer(bias=bias).to(device)
    values = torch.randn(3, 40, 256, dtype=torch.bfloat16) * torch.logspace(-3, 3, 40)[:, None].bfloat16()
    gradient = torch.randn(3, 40, 512, dtype=torch.bfloat16) * size
    values, gradient = values.to(device), gradient.to(device)
    ours, right = pass_through(Float8Linear(plain), values, gradient), pass_through(plain, values, gradient)
    assert [part.dtype for part in ours] == [torch.bfloat16] * 2
    for token in range(40):  # none drowns beside a larger one
        assert relative(ours[0][:, token], right[0][:, token]) < ERROR_OF_A_TOKEN
    assert relative(ours[0], right[0]) < ERROR
    assert relative(ours[1], right[1]) < ERROR


def test_a_token_of_zeros_gives_zeros_and_one_that_is_no_number_says_so():
    values = torch.zeros(2, 256, dtype=torch.bfloat16)
    values[1, 3] = torch.nan
    found = Float8Linear(layer())(values)
    assert found[0].eq(0).all()
    assert found[1].isnan().all()


def test_it_keeps_nothing_of_its_input_and_takes_the_bytes_of_bf16():
    ours, kept = Float8Linear(layer()), []
    own = {parameter.data_ptr() for parameter in ours.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda nothing: nothing):
        ours(torch.randn(8, 256, dtype=torch.bfloat16, requires_grad=True))
    assert set(kept) <= own
    scales = 4 * (256 + 512)
    assert sum(parameter.nbytes for parameter in ours.parameters()) == 2 * 256 * 512 + scales
    assert not list(ours.buffers()), "they would be sent to all workers at each step"


def test_its_weight_can_be_read():
    plain = layer()
    weight = Float8Linear(plain).weight
    assert (weight.shape, weight.dtype, weight.device) == (plain.weight.shape, torch.bfloat16, plain.weight.device)
    torch.testing.assert_close(weight, plain.weight, rtol=1 / 15, atol=1e-2)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.double])
def test_a_change_of_the_models_format_leaves_it_in_fp8(dtype, bias):
    ours, values, gradient = Float8Linear(layer(bias=bias)), torch.randn(8, 256), torch.randn(8, 512)
    weight, before = ours.weight, pass_through(ours, values, gradient)
    ours.to(dtype)
    assert torch.equal(ours.weight, weight)
    for after, right in zip(pass_through(ours, values, gradient), before, strict=True):
        torch.testing.assert_close(after, right)
    assert pass_through(ours, values.to(dtype), gradient.to(dtype))[0].dtype == dtype


@on_a_gpu
@on_no_older_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.float32])
@pytest.mark.parametrize("width", [16, 48, 4096, 14336, 65536])
def test_the_kernel_gives_the_numbers_of_torch(width, dtype):
    from train.fp8_rows import quantise_rows as by_kernel

    torch.manual_seed(0)
    values = torch.randn(width, 37, device="cuda").mul(torch.logspace(-3, 3, 37, device="cuda")).to(dtype).t()  # no row lies together
    values[3], values[5, 7], values[6, 9] = 0, torch.nan, torch.inf
    found, right = by_kernel(values, LARGEST, SMALLEST_ROW), quantise_rows(values)
    assert found[0][5, 7].float().isnan(), "and with it all that the row is multiplied with"
    others = [row for row in range(37) if row != 5]  # torch's largest of that row is no number either
    for ours, of_torch in zip(found, right, strict=True):
        torch.testing.assert_close(ours.float()[others], of_torch.float()[others], rtol=0, atol=0, equal_nan=True)


def test_head_embedding_and_odd_sizes_stay_as_they_are():
    base = tiny()
    base.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 60, bias=False)
    quantise_base(base)
    assert type(base.lm_head) is torch.nn.Linear
    assert type(base.model.layers[0].mlp.up_proj) is torch.nn.Linear
    in_fp8 = {name.rpartition(".")[2] for name, part in base.named_modules() if isinstance(part, Float8Linear)}
    assert in_fp8 == LINEAR


def test_a_model_without_a_layer_that_fits_is_refused():
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    with pytest.raises(ModelError, match="does not suit this model") as refused:
        quantise_base(LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes)))
    assert refused.value.remedy == "train.precision=auto"


def small(in_fp8: bool) -> LlamaForCausalLM:
    """Make the benchmarks' tiny shape with a small vocabulary, in bf16."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **sizes)).bfloat16()
    if in_fp8:
        quantise_base(base)
    return base


def train(folder: Path, in_fp8: bool, gradient_checkpointing: bool = False, compiles: bool = False) -> dict[int, float]:
    settings = {"batch_size": 4, "micro_batch_size": 2, "learning_rate": RATE, "max_steps": NUM_STEPS, "log_every_steps": 1}
    settings |= {"checkpoint_every_steps": 100, "lora": {"rank": 8}}
    config = ChatbotConfig.model_validate({"name": "bot", "data": {"source": "x"}, "train": settings})
    set_seed(config.train.seed)
    model = add_adapter(small(in_fp8), config.train.lora, gradient_checkpointing, compiles=compiles)
    trainer = OrderedTrainer(
        RowOrder(ROWS, config.train.batch_size, config.train.seed, by_length=True),
        model=model,
        args=training_arguments(config, folder, 1, len(ROWS), 32, autocast=True),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        data_collator=Padder(0),
    )
    trainer.train()
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@on_no_older_gpu
def test_a_run_has_the_losses_of_bf16_and_recomputing_changes_none(tmp_path):
    """At most 0.2 % apart when this was written. At ten times this rate bf16's own losses are 3 % from those of fp32."""
    right, ours = train(tmp_path / "bf16", False), train(tmp_path / "fp8", True)
    assert len(ours) == NUM_STEPS
    assert right[NUM_STEPS] < 0.8 * right[1], "it learns"
    assert ours == pytest.approx(right, rel=0.01)
    # On a GPU sums may end in another order.
    same = pytest.approx(ours, rel=0.01) if torch.cuda.is_available() else ours
    assert train(tmp_path / "recomputed", True, gradient_checkpointing=True) == same


@on_no_older_gpu
@pytest.mark.usefixtures("traced")
def test_compiled_blocks_have_the_losses_of_ours_and_are_compiled_whole(tmp_path):
    ours, compiled = train(tmp_path / "ours", True), train(tmp_path / "compiled", True, compiles=True)
    assert compiled == pytest.approx(ours, rel=0.01)
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 0
    assert not counters["graph_break"]


def with_fp8(gradient_checkpointing: bool = False):
    base = tiny()
    quantise_base(base)
    return with_adapter(base, gradient_checkpointing)


def test_each_matrix_of_the_adapter_learns_and_nothing_else(tmp_path):
    batch = Padder(0)(rows())
    plain, recomputed = (step(with_fp8(recomputes), batch) for recomputes in (False, True))
    assert_same(plain, recomputed)
    assert plain[1].keys() == step(with_adapter(), batch)[1].keys()
    assert all(gradient.abs().max() > 0 for gradient in plain[1].values())


def test_its_adapter_is_the_ordinary_one(tmp_path):
    from peft import PeftModel

    in_fp8, plain = with_fp8(), with_adapter()
    in_fp8.save_pretrained(tmp_path / "fp8")
    plain.save_pretrained(tmp_path / "plain")
    check_adapter(tmp_path / "fp8", max_lora_rank=4)
    ours, right = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("fp8", "plain"))
    assert {name: (part.shape, part.dtype) for name, part in ours.items()} == {
        name: (part.shape, part.dtype) for name, part in right.items()
    }
    batch = Padder(0)(rows())
    loaded = PeftModel.from_pretrained(tiny(), str(tmp_path / "fp8"))
    del batch["labels"]
    with torch.no_grad():
        assert relative(in_fp8.eval()(**batch).logits, loaded.eval()(**batch).logits) < 0.1


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@on_no_older_gpu
def test_the_setting_loads_a_base_in_fp8_that_packs(folder):
    base = load_base(folder, ModelConfig(precision="bf16"), TrainConfig(precision="fp8", packing=True), 64)
    assert base.dtype == torch.bfloat16
    assert isinstance(base.model.layers[0].self_attn.q_proj, Float8Linear)
    assert add_adapter(base, LoraConfig(), gradient_checkpointing=True).peft_config


@on_no_older_gpu
def test_a_card_is_measured_with_the_layers_that_it_trains_with():
    settings = {"precision": "fp8", "batch_size": 2, "micro_batch_size": 2, "gradient_checkpointing": False}
    config = ChatbotConfig.model_validate({"name": "bot", "data": {"source": "x"}, "train": settings})
    base = make_base(tiny().config.to_dict(), config, 32)
    assert run_steps(base, config, make_rows((16, 15), 6, 128), num_steps=1).tokens_per_s > 0
    assert isinstance(base.model.layers[0].mlp.up_proj, Float8Linear), "the adapter is taken off again"


def test_a_gpu_without_fp8_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A10")
    with pytest.raises(ClusterError, match=r"A10 has compute capability 8\.6") as refused:
        load_base(tmp_path / "nothing there", ModelConfig(), TrainConfig(precision="fp8"), 64)
    assert refused.value.remedy == "train.precision=auto"


def test_adapters_that_share_a_base_in_fp8_learn_as_alone():
    """Each token is quantised by itself, whoever else is there; a sum in another order rarely ends in another of FP8's numbers."""
    bases = [tiny().double() for _ in range(2)]
    for base in bases:
        quantise_base(base)
    both, single = (SharedBase(Group(base, ROWS, rows((5, 8)))) for base in bases)
    for trial in "ab":
        both.join(trial, shared_config(trial))
    single.join("b", shared_config("b"))
    assert steps(both, "ab", 10)["b"] == pytest.approx(steps(single, "b", 10)["b"], rel=0.01)


def test_a_base_in_fp8_is_shared_by_its_like_alone():
    def wanted(**train):
        return ChatbotConfig.model_validate({"name": "bot", "data": {"source": "x"}, "train": train})

    assert why_apart(wanted(precision="fp8"), wanted(precision="fp8")) is None
    assert "train.precision differs" in why_apart(wanted(precision="fp8"), wanted())


def test_a_version_says_what_base_it_was_trained_on():
    tags = [{}, {"quantization": "nf4", "precision": "auto"}, {"quantization": "none", "precision": "fp8"}]
    assert [trained_on(Version("bot", 1, "run", found)) for found in tags] == ["none", "nf4", FP8_BY_ROWS]
