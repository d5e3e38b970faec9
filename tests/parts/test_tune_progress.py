"""What a sweep tells while it goes on: a line for each look without a terminal, and in the line of jobs how far it is."""

from types import SimpleNamespace

import pytest

from cluster.job_queue import NewJob, Queue
from configs.cli import JOB_VARIABLE
from configs.schema import ChatbotConfig
from tests.parts.test_tune_asha import NUM_LOOKS, OneCard, asha
from tune.extent import how_far, likely_runs
from tune.progress import Lines

SPACE = {"train.lora.rank": {"choice": [2, 4, 8]}, "train.learning_rate": {"choice": [0.1, 0.01, 0.001]}}
RANGE = {"train.learning_rate": {"log": [0.001, 0.1]}}


def chatbot(**tune) -> ChatbotConfig:
    return ChatbotConfig.model_validate({"name": "bot", "data": {"source": "x"}, "tune": {"space": SPACE, **tune}})


def looked(share: float, **found: object) -> dict[str, object]:
    """The newest result of a trial."""
    return {"looks": [{"share": share, "eval_loss": 1.21664}], **found}


class Trial(SimpleNamespace):
    """What is shown of a trial of Tune's."""

    def __str__(self) -> str:
        return self.name


def trial(number: int, result: dict[str, object], status: str = "RUNNING") -> Trial:
    settings = {"train.learning_rate": 0.004, "train.lora.rank": 8}
    return Trial(name=f"trial_{number:05d}", status=status, last_result=result, config={"settings": settings})


@pytest.fixture
def lines(monkeypatch) -> Lines:
    monkeypatch.setattr(Lines, "printed_s", {})
    monkeypatch.setattr(Lines, "noted_s", -1000.0)
    return Lines(chatbot())


def test_a_look_is_a_line_unless_they_come_fast_and_an_end_always(lines, home, capsys):
    trials = [trial(3, looked(1 / 3)), trial(4, {})]
    lines.looked(trials[0], trials)
    lines.looked(trials[0], trials)
    lines.looked(trials[1], trials)
    lines.ended(trials[0])
    lines.ended(trial(5, {"reason": "it has 2 blocks [of 9]"}, "TERMINATED"))
    assert capsys.readouterr().out.splitlines() == [
        "tune   trial 3 · learning_rate=0.004 rank=8 · 33% of a run · eval_loss 1.2166",
        "tune   trial 4 · learning_rate=0.004 rank=8 · 0% of a run",
        "tune   trial 3 · learning_rate=0.004 rank=8 · 33% of a run · eval_loss 1.2166 · ended",
        "tune   trial 5 · learning_rate=0.004 rank=8 · 0% of a run · it has 2 blocks [of 9]",
    ]


def test_the_line_of_jobs_is_told_how_far_it_is(lines, home, monkeypatch):
    with Queue() as queue:
        number = queue.submit(NewJob("sweep", "bot", "name: bot")).id
        monkeypatch.setenv(JOB_VARIABLE, str(number))
        trials = [trial(3, looked(1 / 3)), trial(4, looked(1.0), "TERMINATED"), trial(5, {}, "PENDING")]
        lines.looked(trials[0], trials)
        job = queue.find(number)
        assert (job.step, job.num_steps) == (133, 233)


@pytest.mark.parametrize(("num_trials", "share"), [(9, 0.33), (15, 0.33), (15, 0.01), (15, 1.0), (2, 0.33), (27, 0.5)])
def test_what_asha_is_likely_to_train_is_what_it_trains_on_one_card(num_trials, share):
    card = OneCard(asha(share=share), [*range(num_trials)])
    card.add()
    card.run()
    sweep = chatbot(budget={"share": share}).tune
    assert likely_runs(sweep, num_trials) == pytest.approx(card.num_looks / NUM_LOOKS)


def test_the_end_is_told_as_far_as_the_config_sets_one():
    results = [looked(0.5, num_tokens=200, time_total_s=900), looked(1.0, num_tokens=400, time_total_s=1800), {"reason": "too large"}, {}]
    assert how_far(results, chatbot(scheduler="grid").tune, 1) == (150, 800), "of nine one cannot be trained"
    assert how_far(results, chatbot(scheduler="pbt", budget={"trials": 4}, space=RANGE).tune, 1) == (150, 300)
    assert how_far(results, chatbot(space=RANGE, budget={"tokens": 1200}).tune, 1) == (150, 300)
    assert how_far(results, chatbot(space=RANGE, budget={"hours": 1.0}).tune, 4) == (150, 800)
    assert how_far(results, chatbot(scheduler="grid", budget={"tokens": 1200}).tune, 1) == (150, 300), "what is reached first"
    assert how_far(results, chatbot(scheduler="optuna", budget={"trials": 9}).tune, 1) == (150, 0), "who knows what it stops"
    assert how_far([{}, {}], chatbot(space=RANGE, budget={"tokens": 1200}).tune, 1) == (0, 0)
    assert how_far([looked(1.0)] * 9, chatbot().tune, 1) == (233, 233), "more than was likely"
