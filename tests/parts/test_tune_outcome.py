"""What a sweep draws, spends and concludes, without a cluster."""

import json
from io import StringIO
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyarrow.fs import LocalFileSystem
from ray.exceptions import RayTaskError
from rich.console import Console

from configs.schema import ChatbotConfig
from train.places import on_disk
from tune.looks import newest_tokens, read_looks
from tune.outcome import Row, best_row, read_rows, summary, table
from tune.plots import draw
from tune.record import Spent, write_summary
from tune.schedule import Budget, make_search
from tune.trial import memory_reason, trial_config

PNG = b"\x89PNG"


def chatbot(**tune) -> ChatbotConfig:
    space = {"train.lora.rank": {"choice": [4, 8]}, "train.learning_rate": {"choice": [1e-3, 1e-2]}}
    return ChatbotConfig.model_validate({"name": "bot", "data": {"source": "x"}, "tune": {"space": space, **tune}})


def row(number: int, *losses: float, reason: str | None = None, num_looks: int = 4) -> Row:
    looks = [
        {"step": place * 10, "share": place / num_looks, "num_tokens": place * 100, "loss": loss + 1, "eval_loss": loss}
        for place, loss in enumerate(losses, 1)
    ]
    settings = {"train.lora.rank": 4 + number, "train.learning_rate": 10.0**-number}
    return Row(f"trial_{number:05d}", settings, looks, min(losses, default=None), reason, Path("checkpoint"), {})


ROWS = (row(1, 5.0, 4.0, 3.0, 3.5), row(2, 6.0), row(3, 5.5, 1.0, reason="out of memory: 3 GiB more"), row(4, reason="it cannot be"))


def test_the_best_is_a_trial_with_a_score_that_did_not_fail():
    assert best_row(ROWS, chatbot().tune) == ROWS[0]
    assert best_row(ROWS, chatbot(mode="max").tune) == ROWS[1]
    assert best_row(ROWS[2:], chatbot().tune) is None


def tried(number: int, *losses: float) -> tuple[SimpleNamespace, SimpleNamespace]:
    """A trial and its result, as Tune gives them."""

    class Trial(SimpleNamespace):
        def __str__(self) -> str:
            return f"trial_{number:05d}"

    looks = row(number, *losses).looks
    kept = [
        (SimpleNamespace(path=f"checkpoint-{look['step']}", filesystem=LocalFileSystem()), {"eval_loss": look["eval_loss"], "looks": looks})
        for look in looks
    ]
    result = SimpleNamespace(metrics={"looks": looks}, error=None, best_checkpoints=kept)
    return Trial(config={"settings": {"train.lora.rank": 4, "train.learning_rate": 0.01}}), result


class Results(list):
    """What a sweep of Tune's returns."""

    def __init__(self, *trials) -> None:
        super().__init__(result for _, result in trials)
        self._experiment_analysis = SimpleNamespace(trials=[trial for trial, _ in trials])


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_trial_that_diverges_is_not_the_best(mode, tmp_path, registry):
    sweep = chatbot(mode=mode).tune
    rows = read_rows(Results(tried(1, nan, inf), tried(2, nan, 5.0, nan, 4.5, 7.0), tried(3, 6.0)), sweep)
    assert rows[0].reason == "it diverged: its eval_loss was inf at every look"
    assert [row.score for row in rows] == ([None, 4.5, 6.0] if mode == "min" else [None, 7.0, 6.0])
    assert best_row(rows, sweep) == rows[1]
    assert on_disk(rows[1].checkpoint) == Path("checkpoint-40" if mode == "min" else "checkpoint-50")
    assert best_row(rows[:1], sweep) is None
    draw(tmp_path / "summary", rows, sweep)
    client = registry.client
    run = client.create_run(client.create_experiment("bot", artifact_location=str(tmp_path / "artifacts")))
    write_summary(client, run.info.run_id, tmp_path / "summary", rows, summary(rows))
    told = json.loads((tmp_path / "summary" / "trials.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert [look["eval_loss"] for look in told["trials"][1]["looks"]] == [None, 5.0, None, 4.5, 7.0]


def reported(trial: str, rate: float, num_tokens: int, *losses: float) -> dict[str, object]:
    """A result as a trial's host reports it."""
    looks = row(1, *losses).looks
    return {"trial": trial, "settings": {"train.learning_rate": rate}, "num_tokens": num_tokens, "eval_loss": losses[-1], "looks": looks}


def test_a_trial_that_copied_another_has_its_own_tokens_and_the_settings_of_its_best_checkpoint():
    name = "trial_00002"
    kept = [reported(name, 0.1, 100, 6.0), reported(name, 0.1, 200, 6.0, 5.5), reported(name, 0.03, 300, 5.0, 4.0, 3.0)]
    trial, result = tried(2)
    trial.config = {"settings": {"train.learning_rate": 0.024}}  # as it was changed once more after that
    result.best_checkpoints = [(str(place), found) for place, found in enumerate(kept)]
    result.metrics = reported(name, 0.024, 400, 5.0, 4.0, 3.5)
    (mended,) = read_rows(Results((trial, result)), chatbot().tune)
    assert (mended.settings, mended.checkpoint, mended.score) == ({"train.learning_rate": 0.03}, "2", 3.0)
    assert (mended.num_tokens, mended.share) == (400, 0.75)
    assert summary([mended])["num_tokens_full_grid"] == 400, "what its looks tell of, to the end"

    result.metrics = reported("trial_00001", 0.05, 150, 5.0, 4.5, 4.2, 2.0)  # copied, and it has had no look since
    (copied,) = read_rows(Results((trial, result)), chatbot().tune)
    assert (copied.num_tokens, copied.share, copied.score) == (300, 0.75, 3.0)


def test_tokens_are_added_up_over_a_trials_starts(registry):
    client = registry.client
    run_id = client.create_run(client.create_experiment("bot")).info.run_id
    looks = row(1, 3.0, 2.0, 1.0).looks
    assert Spent(client, run_id).add(newest_tokens(looks[:1])) == 100
    again = Spent(client, run_id)
    assert [again.add(newest_tokens(looks[:2])), again.add(newest_tokens(looks))] == [200, 300]
    assert Spent(client, run_id).add(newest_tokens(looks[:2])) == 400, "from another one's first look on"
    assert client.get_run(run_id).data.metrics["num_tokens"] == 400


def test_the_price_is_told_against_all_trials_to_their_end():
    figures = summary(ROWS)
    assert figures["num_tokens"] == 400 + 100 + 200
    assert figures["num_tokens_full_grid"] == 3 * 400
    assert [figures[f"num_{state}"] for state in ("finished", "stopped", "failed")] == [1, 1, 2]


def test_the_table_has_a_row_for_each_trial_with_its_reason():
    console = Console(width=160, record=True, file=StringIO())
    console.print(table(ROWS, chatbot().tune))
    lines = console.export_text().splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3", "4"]
    assert "out of memory: 3 GiB more" in lines[3]
    assert "it cannot be" in lines[4]


@pytest.mark.parametrize("rows", [ROWS, ROWS[3:]])
def test_the_plots_are_pictures_as_far_as_there_is_something_to_draw(tmp_path, rows):
    draw(tmp_path / "summary", rows, chatbot().tune)
    files = sorted((tmp_path / "summary").iterdir())
    assert [file.name for file in files] == (["loss.png", "settings.png"] if rows is ROWS else [])
    assert all(file.read_bytes().startswith(PNG) for file in files)


def test_a_trial_is_measured_and_saved_so_many_times():
    config = chatbot(num_looks=9)
    trial = trial_config(config, {"train.lora.rank": 8, "train.batch_size": 8}, num_rows=500)
    assert (trial.train.lora.rank, trial.train.count_steps(500)) == (8, 189)
    assert trial.train.eval_every_steps == trial.train.checkpoint_every_steps == 21
    assert trial_config(config, {"train.max_steps": 5}, 500).train.eval_every_steps == 1


def test_no_memory_is_told_in_its_own_words_wherever_the_base_is():
    error = RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB.\nIt has a total of 80 GiB.")
    afar = RayTaskError("call", "Traceback\n  CUDA out of memory", error, "ray::BaseActor.call", 7, "127.0.0.1").as_instanceof_cause()
    assert isinstance(afar, RuntimeError)
    assert memory_reason(error) == memory_reason(afar) == "out of memory: CUDA out of memory. Tried to allocate 3.00 GiB."
    assert memory_reason(RuntimeError("another")) is None


def test_a_sweep_ends_when_its_tokens_or_hours_are_used_up():
    tokens, hours, endless = Budget(1000, None), Budget(None, 1.0), Budget(None, None)
    for budget in (tokens, hours, endless):
        assert not budget("a", {"num_tokens": 600, "time_total_s": 3000})
        assert not budget.stop_all()
        budget("b", {"num_tokens": 300, "time_total_s": 500})
        assert not budget.stop_all()
        budget("b", {"num_tokens": 400, "time_total_s": 700})
    assert (tokens.stop_all(), hours.stop_all(), endless.stop_all()) == (True, True, False)


def test_an_hour_of_a_card_is_an_hour_of_each_trial_on_it():
    budget = Budget(None, 1.0, trials_per_card=4)
    for trial in "abc":
        budget(trial, {"time_total_s": 3600})
    budget("d", {"time_total_s": 3500})
    assert not budget.stop_all()
    budget("d", {"time_total_s": 3600})
    assert budget.stop_all()


def test_combinations_of_choices_are_each_tried_once():
    space, _ = make_search(chatbot().tune, num_at_once=1)
    points = [tuple(point.values()) for point in space["settings"]["grid_search"]]
    assert sorted(points) == [(4, 1e-3), (4, 1e-2), (8, 1e-3), (8, 1e-2)]
    fewer, _ = make_search(chatbot(budget={"trials": 3}).tune, num_at_once=1)
    assert [tuple(point.values()) for point in fewer["settings"]["grid_search"]] == points[:3]


def test_looks_are_read_from_a_checkpoint(tmp_path):
    log = [
        {"step": 5, "loss": 3.0, "num_input_tokens_seen": 50},
        {"step": 10, "eval_loss": 2.5, "num_input_tokens_seen": 100},
        {"step": 15, "loss": 2.0, "num_input_tokens_seen": 150},
        {"step": 20, "eval_loss": 1.5, "num_input_tokens_seen": 200},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"max_steps": 40, "log_history": log}))
    assert read_looks(tmp_path) == [
        {"step": 10, "share": 0.25, "num_tokens": 100, "loss": 3.0, "eval_loss": 2.5},
        {"step": 20, "share": 0.5, "num_tokens": 200, "loss": 2.0, "eval_loss": 1.5},
    ]
