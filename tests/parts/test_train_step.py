"""A run that goes on from a checkpoint takes the same steps as one that was never broken; a real Trainer on a tiny Llama, without Ray."""

import os
import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import set_seed

from configs.schema import ChatbotConfig
from tests.parts.test_train_model import rows, tiny
from train.attention import attend_without_masks, lay_end_to_end
from train.model import add_adapter
from train.rows import Packer, Padder, RowOrder
from train.step import OrderedTrainer, training_arguments

ROWS = rows([6 + place * 5 % 17 for place in range(10)])
STEPS_AN_EPOCH = 3
SAME = 1e-6  # some two units of a loss's last digit


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_trainer(folder: Path, packing: bool, **changes: object) -> OrderedTrainer:
    """Two epochs, in which the order of rows and the dropout matter, in double precision."""
    settings = {"packing": packing, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.05, "num_epochs": 2}
    settings |= {"log_every_steps": 1, "checkpoint_every_steps": 100, "lora": {"rank": 4, "dropout": 0.2}, **changes}
    config = ChatbotConfig.model_validate({"name": "bot", "data": {"source": "x"}, "train": settings})
    set_seed(config.train.seed)
    base = tiny()
    assert lay_end_to_end(base) if packing else attend_without_masks(base, max(len(row["input_ids"]) for row in ROWS))
    model = add_adapter(base, config.train.lora, gradient_checkpointing=False).double()
    return OrderedTrainer(
        RowOrder(ROWS, config.train.batch_size, config.train.seed, by_length=not packing),
        model=model,
        args=training_arguments(config, folder, 1, len(ROWS), 32, autocast=False),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        data_collator=Packer() if packing else Padder(0),
    )


def train(folder: Path, packing: bool, resume: str | None = None) -> dict[int, float]:
    """Train, and return the loss of each step."""
    trainer = make_trainer(folder, packing, **({} if resume else {"checkpoint_every_steps": 1}))
    trainer.args.save_total_limit = None
    trainer.train(resume_from_checkpoint=resume)
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.fixture(scope="module", params=[False, True], ids=["by length", "packed"])
def unbroken(request, tmp_path_factory) -> tuple[bool, Path, dict[int, float]]:
    folder = tmp_path_factory.mktemp("unbroken")
    losses = train(folder, request.param)
    assert sorted(losses) == list(range(1, 2 * STEPS_AN_EPOCH + 1))
    return request.param, folder, losses


@pytest.mark.parametrize("step", [STEPS_AN_EPOCH, STEPS_AN_EPOCH + 1], ids=["epoch begins", "amid an epoch"])
def test_a_resumed_run_takes_the_steps_of_an_unbroken_one(step, unbroken, tmp_path):
    packing, folder, losses = unbroken
    assert train(tmp_path, packing, str(folder / f"checkpoint-{step}")) == pytest.approx(losses, abs=SAME)


def test_an_optimizer_of_8_bit_takes_steps_like_those_of_32_and_is_resumed(tmp_path):
    """Of matrices large enough: bitsandbytes leaves small ones as they are."""
    found = {}
    for name, settings, resume in (
        ("whole", {}, None),
        ("small", {"optimizer_bits": 8, "checkpoint_every_steps": 3}, None),
        ("resumed", {"optimizer_bits": 8}, "small/checkpoint-3"),
    ):
        settings = {"lora": {"rank": 64}, **settings}
        trainer = make_trainer(tmp_path / name, packing=False, **settings)
        trainer.model.float()
        trainer.args.save_total_limit = None
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        kinds = {state["state1"].dtype for state in trainer.optimizer.state.values() if "state1" in state}
        assert (torch.uint8 in kinds) == ("optimizer_bits" in settings)
        found[name] = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert found["small"] == pytest.approx(found["whole"], rel=0.05)
    assert found["small"] != found["whole"]
    assert found["resumed"] == pytest.approx(found["small"], abs=SAME)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_every_schedule_warms_up(schedule, tmp_path):
    settings = {"schedule": schedule, "warmup_share": 0.5, "max_steps": 10}
    config = ChatbotConfig.model_validate({"name": "bot", "data": {"source": "x"}, "train": settings})
    arguments = training_arguments(config, tmp_path, 1, 10, 32, autocast=False)
    trainer = OrderedTrainer(
        RowOrder(ROWS, 4, 0, by_length=True), model=tiny(), args=arguments, train_dataset=ROWS, data_collator=Padder(0)
    )
    trainer.create_optimizer_and_scheduler(10)
    rates = []
    for _ in range(5):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == sorted(rates)
    assert rates[0] < rates[-1] < config.train.learning_rate


@pytest.mark.parametrize(("longest_tokens", "num_rows"), [(32, 64), (900, 2), (5000, 2)])
def test_evaluation_fills_its_batches(longest_tokens, num_rows, tmp_path):
    config = ChatbotConfig.model_validate({"name": "bot", "data": {"source": "x"}, "train": {"micro_batch_size": 2}})
    assert training_arguments(config, tmp_path, 1, 10, longest_tokens, autocast=False).per_device_eval_batch_size == num_rows


@pytest.mark.parametrize("packing", [False, True])
def test_it_counts_the_tokens_of_rows_and_not_what_fills_them_up(packing, tmp_path):
    trainer = make_trainer(tmp_path, packing)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 2 * sum(len(row["input_ids"]) for row in ROWS)


def test_dropout_is_at_work_in_each_step_and_in_no_evaluation(tmp_path):
    """A base comes out of training, and the model is put into it as a whole once."""
    trainer = make_trainer(tmp_path, packing=False, eval_every_steps=1)
    dropouts = [layer for layer in trainer.model.modules() if isinstance(layer, torch.nn.Dropout)]
    seen = []
    for layer in dropouts:
        layer.register_forward_pre_hook(lambda layer, _: seen.append((torch.is_grad_enabled(), layer.training)))
    trainer.train()
    assert dropouts
    assert set(seen) == {(True, True), (False, False)}


def test_the_weights_that_learn_have_no_gradient_left_after_a_step(tmp_path):
    trainer = make_trainer(tmp_path, packing=False, num_epochs=1)
    trainer.train()
    assert trainer.trained == [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert {weight.grad for weight in trainer.trained} == {None}


class Waits(TorchDispatchMode):
    """Finds what asks a tensor for its numbers, for which a GPU would be waited for; by the file that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name.startswith(("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")) or _chooses(name, args):
            files = [frame.filename for frame in traceback.extract_stack() if f"{os.sep}torch{os.sep}" not in frame.filename]
            self.found.append(Path(files[-2]).name)
        return function(*args, **(kwargs or {}))


def _chooses(name: str, args) -> bool:
    """Whether values are taken, or put, by what is true in a mask."""
    return name.startswith("aten::index") and any(
        torch.is_tensor(place) and place.dtype == torch.bool for place in (args[1] if isinstance(args[1], list | tuple) else [])
    )


@pytest.mark.parametrize("packing", [False, True], ids=["by length", "packed"])
def test_nothing_waits_for_a_gpu_in_a_step(packing, tmp_path):
    trainer = make_trainer(tmp_path, packing)
    waits, training_step = Waits(), trainer.training_step

    def watched(*arguments, **settings):
        with waits:
            return training_step(*arguments, **settings)

    trainer.training_step = watched
    trainer.train()
    assert waits.found == []
