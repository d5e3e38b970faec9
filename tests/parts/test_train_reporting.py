"""What a run reports: a held-out loss only for the adapter it was measured on, and a speed without evaluation and saving."""

import json
import math
import shutil
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.home import log_folder
from cluster.logs import TRAINING, stream_file
from cluster.memory import Device, Rows
from cluster.plan import Place
from cluster.shape import Shape
from configs.errors import RunError
from configs.schema import ChatbotConfig
from tests.parts.test_train_model import rows, tiny
from tests.ray.stack import losses_of
from train.control import Progress
from train.model import add_adapter
from train.reporting import NUM_WARMUP_STEPS, ReportCallback
from train.rows import Padder, RowOrder
from train.sizing import Sizing
from train.step import OrderedTrainer, training_arguments
from train.worker import Task

SIZING = Sizing(Shape(32, 64, 2, 4, 2, 8, 128, 64, tied=False), Rows(32, 32), Place("card1", 8, Device(on_gpu=False, value_bytes=4)))
ROWS = rows([6 + place * 5 % 17 for place in range(10)])
BATCHING_S, SLOW_S = 1.0, 100.0


class Timed(ReportCallback):
    """Has a clock of its own, by which each step takes a second, and each evaluation and each saving long."""

    now_s = 0.0

    def on_step_begin(self, *_, **__):
        Timed.now_s += BATCHING_S

    def on_prediction_step(self, *_, **__):
        Timed.now_s += SLOW_S

    def on_save(self, args, state, control, **_):
        Timed.now_s += SLOW_S
        super().on_save(args, state, control)


def make_trainer(callback: ReportCallback, scratch: Path) -> OrderedTrainer:
    torch.manual_seed(0)
    config = callback.task.config
    return OrderedTrainer(
        RowOrder(ROWS, 4, 0, by_length=True),
        model=add_adapter(tiny(), config.train.lora, False),
        args=training_arguments(config, scratch, 1, len(ROWS), 32, autocast=False),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        data_collator=Padder(0),
        callbacks=[callback],
    )


@pytest.fixture
def make_task(registry, make_run):
    def make(**settings: Any) -> Task:
        train = {"batch_size": 4, "max_steps": 6, "log_every_steps": 1, **settings}
        config = ChatbotConfig.model_validate({"name": "bot", "data": {"source": "x"}, "train": train})
        return Task(config, make_run().manifest.run_id, "", "", "", 8, registry.url, SIZING)

    return make


@pytest.fixture
def reported(make_task, tmp_path, monkeypatch):
    """Train six steps, evaluate each second and save each; return the callback and what its host was told."""
    monkeypatch.setattr("train.reporting.time", SimpleNamespace(perf_counter=lambda: Timed.now_s, time=time.time))
    found: list[dict[str, float]] = []
    task = make_task(micro_batch_size=4, checkpoint_every_steps=1, eval_every_steps=2)
    host = SimpleNamespace(num_workers=1, is_first=True, report=lambda metrics, folder: found.append(metrics), send=lambda progress: None)
    callback = Timed(task, host)
    make_trainer(callback, tmp_path / "scratch").train()
    return callback, found


class AskedInStep:
    """A host that asks a run to leave while it is in the midst of a step."""

    num_workers, is_first = 1, True

    def __init__(self, after_step: int, kept: Path) -> None:
        self.after_step, self.kept, self.heard, self.told = after_step, kept, Counter[int](), set[Progress]()
        self.saved: list[int] = []

    def send(self, progress: Progress) -> str | None:
        self.heard[progress.step] += 1
        self.told.add(progress)
        return "chat wants its card" if progress.step == self.after_step and self.heard[progress.step] > 1 else None

    def report(self, metrics: dict[str, float], folder: Path) -> None:
        self.metrics = metrics
        self.saved.append(int(metrics["step"]))
        shutil.rmtree(self.kept, ignore_errors=True)
        shutil.copytree(folder, self.kept)


@pytest.mark.parametrize("after_step", [2, 3], ids=["in an epoch", "after an epoch"])
def test_a_run_leaves_in_the_midst_of_a_step_and_goes_on_as_if_it_had_not(after_step, make_task, registry, tmp_path, monkeypatch):
    monkeypatch.setattr("train.reporting.ASK_EVERY_S", 0.0)
    settings = {"micro_batch_size": 1, "checkpoint_every_steps": 100, "eval_every_steps": 1, "lora": {"dropout": 0.2}}
    undisturbed = ReportCallback(make_task(**settings), AskedInStep(-1, tmp_path / "whole"))
    make_trainer(undisturbed, tmp_path / "1").train()

    leaving = ReportCallback(make_task(**settings), AskedInStep(after_step, tmp_path / "left"))
    make_trainer(leaving, tmp_path / "2").train()
    host = leaving.host
    assert host.saved == [after_step]
    assert host.heard[after_step] == 2, "it left after the first of the next step's four rows"
    speeds = {(progress.step, progress.tokens_per_s) for progress in host.told}
    assert len(speeds) == after_step + 1, "in the midst of a step the speed is that of whole steps"
    state = json.loads((tmp_path / "left" / "trainer_state.json").read_text())
    assert state["num_input_tokens_seen"] == host.metrics["num_tokens"]

    going_on = ReportCallback(leaving.task, AskedInStep(-1, tmp_path / "whole again"))
    make_trainer(going_on, tmp_path / "3").train(resume_from_checkpoint=str(tmp_path / "left"))
    assert losses_of(registry.client, going_on.task.run_id) == pytest.approx(losses_of(registry.client, undisturbed.task.run_id), rel=1e-6)
    assert going_on.host.metrics["num_tokens"] == undisturbed.host.metrics["num_tokens"]


def test_a_step_that_is_saved_already_is_not_saved_again(make_task, tmp_path, monkeypatch):
    monkeypatch.setattr("train.reporting.ASK_EVERY_S", 0.0)
    callback = ReportCallback(make_task(micro_batch_size=1, checkpoint_every_steps=2), AskedInStep(2, tmp_path / "left"))
    make_trainer(callback, tmp_path / "scratch").train()
    assert callback.host.saved == [2]


def test_a_process_ends_its_first_step(make_task, tmp_path, monkeypatch):
    monkeypatch.setattr("train.reporting.ASK_EVERY_S", 0.0)
    callback = ReportCallback(make_task(micro_batch_size=1, checkpoint_every_steps=100), AskedInStep(0, tmp_path / "left"))
    make_trainer(callback, tmp_path / "scratch").train()
    assert (callback.host.heard[0], callback.host.saved) == (1, [6])


def test_a_loss_that_is_no_number_ends_the_run_with_its_reason(reported):
    callback, _ = reported
    state = SimpleNamespace(global_step=7, max_steps=9, num_input_tokens_seen=100)
    with pytest.raises(RunError, match=r"training diverged by step 7\nthe loss is no number any more"):
        callback.on_log(None, state, None, {"loss": math.nan})


def test_only_the_checkpoint_of_an_evaluations_step_carries_its_loss(reported, registry):
    callback, found = reported
    assert [metrics["step"] for metrics in found] == [1, 2, 3, 4, 5, 6]
    measured = {metrics["step"]: metrics["eval_loss"] for metrics in found if "eval_loss" in metrics}
    history = registry.client.get_metric_history(callback.task.run_id, "eval_loss")
    assert sorted(measured) == [2, 4, 6]
    assert measured == pytest.approx({metric.step: metric.value for metric in history})


def test_evaluation_and_saving_are_no_part_of_the_speed(reported):
    callback, _ = reported
    assert callback.steps_s == (6 - NUM_WARMUP_STEPS) * BATCHING_S


def test_the_plans_peak_stands_beside_the_one_that_was_measured(reported, registry):
    callback, _ = reported
    found = {name: registry.client.get_metric_history(callback.task.run_id, f"memory/{name}_gib") for name in ("predicted", "measured")}
    assert [metric.step for metric in found["measured"]] == [metric.step for metric in found["predicted"]] == [1, 2, 3, 4, 5, 6]
    assert all(metric.value > 0.1 for metrics in found.values() for metric in metrics)


def test_the_log_has_a_line_for_each_step_and_each_evaluation(reported):
    callback, _ = reported
    told = [json.loads(line) for line in stream_file(log_folder(), TRAINING).read_text().splitlines()]
    assert {(line["run"], line["chatbot"]) for line in told} == {(callback.task.run_id, "bot")}
    trained = [line for line in told if line["event"] == "trained"]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss"] > 0 and line["memory_gib"] > 0 and line["num_steps"] == 6 for line in trained)
    assert trained[-1].keys() >= {"epoch", "learning_rate", "tokens_per_s"}
    assert [(line["step"], line["eval_loss"] > 0) for line in told if line["event"] == "evaluated"] == [(2, True), (4, True), (6, True)]
