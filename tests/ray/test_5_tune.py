"""Sweeps on a real cluster: who goes on, a driver and a worker killed, trials that cannot be, each scheduler; all on a tiny model."""

import json
import re
from collections import Counter

import pytest

from tests.ray.stack import RUN_ID, Stack, wait_for
from tests.ray.test_2_training import read_until
from train.record import read_config
from tune.record import find_runs

SWEEP_ID = re.compile(r"sweep ([0-9a-f]{32})")
CANDIDATE = re.compile(r"is (\S+), the candidate")


def trial_runs(stack: Stack, sweep_id: str):
    """The MLflow run of each trial, by the trial's number."""
    client = stack.registry.client
    runs = find_runs(client, client.get_run(sweep_id))
    return [client.get_run(run_id) for _, run_id in sorted(runs.items())]


def steps_of(stack: Stack, run) -> Counter[int]:
    """How often each step of a trial was done."""
    return Counter(metric.step for metric in stack.registry.client.get_metric_history(run.info.run_id, "loss"))


def num_looks(stack: Stack, sweep_id: str) -> int:
    history = stack.registry.client.get_metric_history
    return sum(len(history(run.info.run_id, "eval_loss")) for run in trial_runs(stack, sweep_id))


def test_a_sweep_as_a_job_trains_the_best_on_and_registers_it_as_candidate(stack: Stack, config):
    """Two of its six trials cannot be trained: the model has no nine blocks."""
    space = "tune.space={train.lora.num_layers: {choice: [1, 2, 9]}, train.learning_rate: {choice: [0.01, 0.0001]}}"
    settings = ["train.max_steps=18", "tune.num_looks=4", "tune.reduction=2"]
    job = stack.begin("ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "tune", str(config), space, *settings, job=True)
    text, _ = job.communicate(timeout=300)
    assert job.returncode == 0, text
    sweep_id, version = SWEEP_ID.search(text)[1], stack.registry.find(CANDIDATE.search(text)[1])
    assert "candidate" in version.aliases
    assert "live" not in version.aliases
    client = stack.registry.client
    sweep, trials = client.get_run(sweep_id), trial_runs(stack, sweep_id)
    assert sweep.info.status == "FINISHED"
    assert len(trials) == 6
    failed = [run for run in trials if run.info.status == "FAILED"]
    assert {run.data.params["train.lora.num_layers"] for run in failed} == {"9"}
    assert all("this model has 2 blocks" in run.data.tags["reason"] for run in failed)
    assert text.count("this model has 2 blocks") == 4, "each told as it fails, and in the table"
    finished = [run for run in trials if run.info.status == "FINISHED"]
    assert [run.info.run_id for run in finished] == [version.run_id], "one gets to the end: two of four go on, and one of them"
    scores = {run.info.run_id: run.data.metrics["score"] for run in trials if run not in failed}
    assert min(scores, key=scores.get) == version.run_id
    assert json.loads(version.tags["scores"])["eval_loss"] == pytest.approx(scores[version.run_id])
    spent = sum(run.data.metrics.get("num_tokens", 0) for run in trials)
    assert sweep.data.metrics["num_tokens"] == spent
    assert sweep.data.metrics["share_of_full_grid"] == pytest.approx(9 / 16, abs=0.1)
    kept = {file.path for file in client.list_artifacts(sweep_id, "summary")}
    assert kept == {"summary/loss.png", "summary/settings.png", "summary/trials.json"}
    served = json.loads((stack.registry.download(version) / "adapter_config.json").read_text())
    assert served["r"] == 4
    kept_config = read_config(client, version.run_id)
    assert kept_config.train.lora.num_layers in (1, 2), "with which `python -m train evaluate` asks it"


def test_a_sweep_goes_on_when_its_driver_and_later_a_worker_are_killed(stack: Stack, config):
    """Each kill costs a trial at most the training between two looks, 25 steps."""
    space = "tune.space={train.lora.rank: {choice: [1, 2]}, train.learning_rate: {choice: [0.01, 0.001]}}"
    settings = ["train.max_steps=200", "tune.num_looks=8", "tune.reduction=2"]
    driver = stack.begin("tune", str(config), space, *settings)
    found, _ = read_until(driver, SWEEP_ID)
    sweep_id = found[1]
    wait_for(lambda: num_looks(stack, sweep_id) >= 3)
    driver.kill()
    driver.wait(30)
    wait_for(lambda: not stack.workers("ImplicitFunc"))
    before = [steps_of(stack, run) for run in trial_runs(stack, sweep_id)]
    assert sum(map(len, before)) < 400, "before its end"

    driver = stack.begin("tune", str(config), "--resume", sweep_id)
    read_until(driver, SWEEP_ID)
    looks_before = num_looks(stack, sweep_id)
    wait_for(lambda: num_looks(stack, sweep_id) > looks_before)
    wait_for(lambda: stack.workers("ImplicitFunc"))[0].kill()
    text, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, text
    assert CANDIDATE.search(text)
    trials = trial_runs(stack, sweep_id)
    assert len(trials) == 4
    assert [run.info.status for run in trials].count("FINISHED") == 1
    again = [sum(count - 1 for count in steps_of(stack, run).values()) for run in trials]
    assert max(again) <= 2 * 25
    for run in trials:
        steps = steps_of(stack, run)
        assert sorted(steps) == list(range(1, max(steps) + 1)), "none was left out"


def test_a_sweep_that_is_asked_to_stop_says_how_to_go_on(stack: Stack, config):
    space = "tune.space={train.lora.rank: {choice: [1, 2]}}"
    driver = stack.begin("tune", str(config), space, "train.max_steps=4000", "tune.budget.trials=1")
    found, _ = read_until(driver, SWEEP_ID)
    wait_for(lambda: trial_runs(stack, found[1]))
    driver.terminate()
    text, _ = driver.communicate(timeout=300)
    assert driver.returncode == 143, text
    assert f"--resume {found[1]}" in text
    assert stack.registry.client.get_run(found[1]).info.status == "KILLED"


def test_trials_that_share_a_base_go_on_when_it_is_killed(stack: Stack, config):
    """Each time it costs each at most the training between two looks; a raylet that is begun again is another node to Ray."""
    space = "tune.space={train.lora.rank: {choice: [2, 4]}}"
    settings = ["train.max_steps=300", "tune.num_looks=12", "tune.scheduler=grid", "tune.trials_per_card=2"]
    driver = stack.begin("tune", str(config), space, *settings)
    found, _ = read_until(driver, SWEEP_ID)
    for num_killed, killed in enumerate(("base", "raylet")):
        looks_before = num_looks(stack, found[1])
        wait_for(lambda: num_looks(stack, found[1]) >= looks_before + 2 + 3 * num_killed)  # noqa: B023 (it is asked at once)
        looks = [steps_of(stack, run) for run in trial_runs(stack, found[1])]
        assert max(max(steps.values(), default=0) for steps in looks) <= 1 + num_killed
        assert sum(sum(steps.values()) - len(steps) for steps in looks) <= 2 * num_killed
        for base in wait_for(lambda: stack.workers("BaseActor")):  # one a card; the trials may be on one of them
            (base if killed == "base" else base.parent()).kill()
    text, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, text
    trials = trial_runs(stack, found[1])
    assert [run.info.status for run in trials] == ["FINISHED"] * 2
    looks = [steps_of(stack, run) for run in trials]
    assert all(sorted(steps) == list(range(25, 301, 25)) for steps in looks)
    assert max(max(steps.values()) for steps in looks) <= 3
    assert sum(sum(steps.values()) for steps in looks) <= 2 * (12 + 2)
    version = stack.registry.find(CANDIDATE.search(text)[1])
    assert (stack.registry.download(version) / "adapter_model.safetensors").is_file()


def test_pbt_lets_a_bad_trial_go_on_from_a_good_one_with_other_settings(stack: Stack, config):
    """With more trials than cards they take turns, so none is at its end before the others have begun."""
    space = "tune.space={train.learning_rate: {log: [1.0e-6, 1.0e-2]}}"
    settings = ["tune.scheduler=pbt", "tune.budget.trials=3", "train.max_steps=16", "tune.num_looks=8"]
    done = stack.run("tune", str(config), space, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    sweep_id, version = SWEEP_ID.search(done.stdout)[1], stack.registry.find(CANDIDATE.search(done.stdout)[1])
    assert "of a run · eval_loss" in done.stdout, "told as it goes on"
    trials = trial_runs(stack, sweep_id)
    assert [run.info.status for run in trials] == ["FINISHED"] * 3
    told = json.loads((stack.home / "sweeps" / sweep_id / "summary" / "trials.json").read_text())
    rates = [trial["settings"]["train.learning_rate"] for trial in told["trials"]]
    begun = [float(run.data.params["train.learning_rate"]) for run in trials]
    assert [rate == pytest.approx(first) for rate, first in zip(rates, begun, strict=True)].count(False) >= 1, (rates, begun)
    assert read_config(stack.registry.client, version.run_id).train.learning_rate in rates
    # All see the same rows at the same step, whoever's adapter they train.
    steps = [look["step"] for look in told["trials"][0]["looks"]]
    places = [0.0, *(look["num_tokens"] for look in told["trials"][0]["looks"])]
    of_look = {step: places[at + 1] - places[at] for at, step in enumerate(steps)}
    for run in trials:
        trained = steps_of(stack, run)
        assert run.data.metrics["num_tokens"] == sum(trained[step] * num_tokens for step, num_tokens in of_look.items())
    assert stack.registry.client.get_run(sweep_id).data.metrics["num_tokens"] == sum(run.data.metrics["num_tokens"] for run in trials)


def test_optuna_proposes_as_many_trials_on_the_one_base_that_has_a_card(stack: Stack, config):
    """A training holds the other card, for which the second base waits, and the trials do not."""
    cards = json.loads((stack.home / "cluster.json").read_text())["cards"]
    if sum(card["pool"] == "train" for card in cards) < 2:
        pytest.skip("there is one train card")
    training = stack.begin("train", str(config), "name=long", "train.max_steps=100000", "train.checkpoint_every_steps=100000")
    found, _ = read_until(training, RUN_ID)
    wait_for(lambda: stack.losses(found[1]))
    space = "tune.space={train.learning_rate: {log: [1.0e-4, 1.0e-2]}, train.lora.rank: {integer: [1, 8]}}"
    settings = ["tune.scheduler=optuna", "tune.budget.trials=4", "tune.num_looks=4", "tune.trials_per_card=2"]
    try:
        done = stack.run("tune", str(config), space, *settings)
        assert training.poll() is None, "it holds its card to the end"
    finally:
        training.terminate()
        training.communicate(timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = trial_runs(stack, SWEEP_ID.search(done.stdout)[1])
    assert len(trials) == 4
    assert {run.info.status for run in trials} <= {"FINISHED", "KILLED"}
    assert len({run.data.params["train.learning_rate"] for run in trials}) == 4
    scores = {run.info.run_id: run.data.metrics["score"] for run in trials}
    version = stack.registry.find(CANDIDATE.search(done.stdout)[1])
    assert version.run_id == min(scores, key=scores.get)
