"""Steps as CUDA graphs: the losses of steps that are asked for kernel by kernel, whatever the rows' lengths, on a real GPU."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import set_seed

from cluster.memory import Device, Rows, Step
from cluster.shape import read_shape
from configs.schema import ChatbotConfig
from tests.parts.test_train_model import rows, tiny
from tests.parts.test_train_unpacked import in_four_bit, llama
from train import graphs
from train.graphs import MicroSteps
from train.model import add_adapter, pick_graphs, suit_attention
from train.rows import Packer, Padder, RowOrder
from train.step import Batch, OrderedTrainer, training_arguments

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
    assert suit_attention(base, config.train.packing, LONGEST)
    model = add_adapter(base, config.train.lora, gradient_checkpointing=config.train.gradient_checkpointing is True)
    arguments = training_arguments(config, folder, 1, len(ROWS), LONGEST, autocast=True)
    arguments.save_strategy = "no"
    order, collate = RowOrder(ROWS, 4, 0, by_length=not config.train.packing), Packer() if config.train.packing else Padder(0)
    trainer = OrderedTrainer(order, collate, cuda_graphs, model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS)
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
def test_packed_rows_as_graphs_have_the_losses_of_those_without(captures, tmp_path):
    _, wanted = train(tmp_path / "without", nf4=False, cuda_graphs=False, packing=True)
    trainer, found = train(tmp_path / "with", nf4=False, cuda_graphs=True, packing=True)
    assert trainer.micro_steps.num_replays > len(captures) > 0
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
@pytest.mark.parametrize(("worth", "used"), [(0.0, False), (1e9, True)])
def test_one_is_tried_and_used_or_not(worth, used, captures, monkeypatch, tmp_path):
    monkeypatch.setattr(graphs, "WORTH", worth)
    _, wanted = train(tmp_path / "without", nf4=True, cuda_graphs=False)
    trainer, found = train(tmp_path / "with", nf4=True, cuda_graphs="auto")
    assert trainer.micro_steps.is_on is used
    assert found == pytest.approx(wanted, rel=2e-2)
    assert captures, "one is tried"


@needs_gpu
def test_what_asks_the_gpu_for_a_number_goes_on_without_graphs_and_learns_the_same(monkeypatch, tmp_path, caplog):
    _, wanted = train(tmp_path / "without", nf4=True, cuda_graphs=False)
    micro_step = OrderedTrainer._micro_step

    def and_ask(self: OrderedTrainer, inputs: Batch, num_items: torch.Tensor) -> torch.Tensor:
        loss = micro_step(self, inputs, num_items)
        assert float(loss) > 0  # which cannot be done while a graph is captured
        return loss

    monkeypatch.setattr(OrderedTrainer, "_micro_step", and_ask)
    trainer, found = train(tmp_path / "with", nf4=True, cuda_graphs=True)
    assert "not replayed as CUDA graphs" in caplog.text
    assert not trainer.micro_steps.is_on
    assert found == pytest.approx(wanted, rel=2e-2)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(2, device="cuda").max() < 1, "random numbers do not wait for the end of a capture"


@pytest.mark.parametrize(("as_graph_s", "used"), [(0.9, False), (0.5, True)])
def test_a_graph_is_used_where_it_is_quicker_than_the_second_step_of_its_shape(as_graph_s, used, monkeypatch):
    """Without a GPU: what is captured is no graph here, and takes the time that it is told to."""
    clock, took_s = [0.0], {"first": 9.0, "second": 1.0, "graph": as_graph_s}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(graphs.time, "perf_counter", lambda: clock[0])
    asked: list[str] = []

    def run(inputs: Batch, num_items: torch.Tensor) -> torch.Tensor:
        asked.append("as it is")
        clock[0] += took_s["second" if len(asked) > graphs.NUM_EAGER + 1 else "first"]
        return torch.tensor(0.0)

    class Graph:
        def replay(self, inputs: Batch, num_items: torch.Tensor) -> torch.Tensor:
            asked.append("graph")
            clock[0] += took_s["graph"]
            return torch.tensor(0.0)

    monkeypatch.setattr(MicroSteps, "_captured", lambda self, inputs, num_items: Graph())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    steps = MicroSteps(run, [], [], wanted="auto")
    for _ in range(8):
        steps.step({"x": torch.zeros(2)}, torch.tensor(1))
    assert asked == ["as it is"] * (graphs.NUM_EAGER + 2) + ["graph"] + ["graph" if used else "as it is"] * (5 - graphs.NUM_EAGER)
    assert steps.is_on is steps.may_be is used


def test_shapes_that_never_come_again_end_the_use_of_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    replayed: list[int] = []

    class Graph:
        def replay(self, inputs: Batch, num_items: torch.Tensor) -> torch.Tensor:
            replayed.append(len(inputs["x"]))
            return torch.tensor(0.0)

    monkeypatch.setattr(MicroSteps, "_captured", lambda self, inputs, num_items: Graph())
    steps = MicroSteps(lambda inputs, num_items: torch.tensor(0.0), [], [], wanted=True)
    for length in range(1, 100):
        steps.step({"x": torch.zeros(length)}, torch.tensor(1))
        assert len(steps.captured) <= graphs.MAX_GRAPHS
    assert len(replayed) == graphs.MANY_CAPTURES
    assert not steps.may_be
    assert not steps.captured


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


@pytest.mark.parametrize(
    ("changes", "model"),
    [
        ({}, {}),
        ({"packing": True}, {}),
        ({"lora": {"dropout": 0.1}}, {}),
        ({"compile": True}, {}),
        ({"cuda_graphs": False}, {}),
        ({"packing": True, "cuda_graphs": True}, {}),
        ({"num_workers": 2}, {}),
        ({}, {"logit_scale": 0.5}),
        ({}, {"attention_dropout": 0.1}),
    ],
)
def test_what_is_not_the_same_each_time_is_no_graph_and_the_plan_knows(changes, model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    train, base = make_config(**changes).train, tiny()
    for name, value in model.items():
        setattr(base.config, name, value)
    wanted = train.cuda_graphs if changes.keys() <= {"packing", "cuda_graphs"} and not model else False
    assert pick_graphs(base, train, train.num_workers) == wanted
    shape = replace(read_shape(base.config.to_dict(), "tiny"), changes_logits="logit_scale" in model)
    planned = Step(shape, train, Rows(LONGEST, LONGEST), Device(on_gpu=True)).may_be_graphs
    assert planned == (wanted is not False or "attention_dropout" in model), "what a base draws the plan does not look for"
