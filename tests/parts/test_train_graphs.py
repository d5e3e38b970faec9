"""Steps as CUDA graphs: the losses of steps that are asked for kernel by kernel, whatever the rows' lengths, on a real GPU."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import set_seed

from configs.schema import ChatbotConfig
from tests.parts.test_train_model import rows, tiny
from tests.parts.test_train_unpacked import in_four_bit, llama
from train import graphs
from train.attention import attend_without_masks
from train.graphs import MicroSteps
from train.model import add_adapter, pick_graphs
from train.rows import Padder, RowOrder
from train.step import OrderedTrainer, training_arguments

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
ROWS = rows([6 + place * 5 % 17 for place in range(16)])
LONGEST = max(len(row["input_ids"]) for row in ROWS)


def make_config(**changes: object) -> ChatbotConfig:
    settings = {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.01, "num_epochs": 4, "log_every_steps": 1}
    return ChatbotConfig.model_validate({"name": "bot", "data": {"source": "x"}, "train": settings | {"lora": {"rank": 4}} | changes})


def train(folder: Path, nf4: bool, cuda_graphs: Literal["auto"] | bool, **changes: object) -> tuple[OrderedTrainer, list[float]]:
    """Train on the GPU in bf16, and return the losses of all steps and evaluations."""
    config = make_config(**changes)
    set_seed(0)
    base = in_four_bit(llama(), dtype=torch.bfloat16, device="cuda") if nf4 else tiny()
    base = base.to("cuda", torch.bfloat16)
    base.is_loaded_in_4bit = nf4
    attend_without_masks(base, LONGEST)
    model = add_adapter(base, config.train.lora, gradient_checkpointing=config.train.gradient_checkpointing is True)
    arguments = training_arguments(config, folder, 1, len(ROWS), LONGEST, autocast=True)
    arguments.save_strategy = "no"
    order = RowOrder(ROWS, 4, 0, by_length=True)
    trainer = OrderedTrainer(order, Padder(0), cuda_graphs, model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.train()
    return trainer, [value for entry in trainer.state.log_history for name, value in entry.items() if name in ("loss", "eval_loss")]


@pytest.fixture
def captures(monkeypatch) -> list[object]:
    """Shapes that were captured, in turn."""
    found: list[object] = []
    capture = MicroSteps._capture
    monkeypatch.setattr(MicroSteps, "_capture", lambda self, shape, *others: found.append(shape) or capture(self, shape, *others))
    return found


@needs_gpu
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("nf4", [False, True])
def test_graphs_have_the_losses_of_steps_without_them(nf4, recomputes, captures, tmp_path):
    changes = {"gradient_checkpointing": recomputes, "eval_every_steps": 6}
    _, wanted = train(tmp_path / "without", nf4, cuda_graphs=False, **changes)
    trainer, found = train(tmp_path / "with", nf4, cuda_graphs=True, **changes)
    assert trainer.micro_steps.is_on
    assert len(set(captures)) > 1, "rows are of several lengths"
    assert len(captures) > len(set(captures)), "an evaluation gave their memory back"
    assert found == pytest.approx(wanted, rel=2e-2)
    assert wanted[-1] < wanted[0], "it learns"


@needs_gpu
def test_of_more_shapes_than_there_may_be_graphs_the_one_used_least_lately_leaves(captures, monkeypatch, tmp_path):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    trainer, _ = train(tmp_path, nf4=False, cuda_graphs=True)
    steps = trainer.micro_steps
    assert list(steps.captured) == [captures[-1]]
    assert len(captures) > len(set(captures)) > 1
    trainer.evaluate()
    assert not steps.captured


@needs_gpu
def test_graphs_are_used_where_they_are_quicker(captures, monkeypatch, tmp_path):
    for worth, used in ((0.0, False), (1e9, True)):
        monkeypatch.setattr(graphs, "WORTH", worth)
        trainer, losses = train(tmp_path / str(used), nf4=False, cuda_graphs="auto")
        assert trainer.micro_steps.is_on is used
        assert losses[-1] < losses[0]
        assert captures, "one is tried"


@needs_gpu
def test_where_a_graph_cannot_be_captured_steps_go_on_without(monkeypatch, tmp_path, caplog):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    trainer, losses = train(tmp_path, nf4=False, cuda_graphs=True)
    assert trainer.state.global_step == trainer.state.max_steps
    assert losses[-1] < losses[0]
    assert "not replayed as CUDA graphs: operation not permitted" in caplog.text


def test_without_graphs_gradients_are_given_back_after_each_step():
    weight = torch.nn.Parameter(torch.ones(2))

    def run(inputs, num_items):
        loss = (weight * inputs["x"]).sum() / num_items
        loss.backward()
        return loss.detach()

    steps = MicroSteps(run, [weight], [], wanted=False)
    for _ in range(2):
        steps.step({"x": torch.tensor([2.0, 4.0])}, torch.tensor(2))
    assert weight.grad.tolist() == [2.0, 4.0], "both micro-steps' sum"
    steps.zero_gradients()
    assert weight.grad is None


@pytest.mark.parametrize("changes", [{"packing": True}, {"lora": {"dropout": 0.1}}, {"cuda_graphs": False}, {}])
def test_what_is_not_the_same_each_time_is_no_graph(changes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = make_config(**changes)
    assert pick_graphs(tiny(), config.train, num_workers=1) == (False if changes else "auto")
    assert pick_graphs(tiny(), config.train, num_workers=2) is False
