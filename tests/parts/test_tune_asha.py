"""Who goes on in a sweep: what it costs, that the best get to the end, and that a resumed one decides as the unbroken one would."""

from types import SimpleNamespace

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from tune.asha import Asha

NUM_LOOKS = 9


class OneCard:
    """Runs trials one after the other as Tune's controller does on one card: a trial's quality is its final loss."""

    def __init__(self, scheduler: Asha, losses: list[float]) -> None:
        self.scheduler = scheduler
        self.search_alg = SimpleNamespace(is_finished=lambda: True)
        self.losses = {f"sweep_{number:05d}": loss for number, loss in enumerate(losses)}
        self.trials = [FakeTrial(trial_id) for trial_id in self.losses]
        self.num_looks = 0

    def get_trials(self):
        return self.trials

    def stop_trial(self, trial):
        self.scheduler.on_trial_remove(self, trial)
        trial.status = Trial.TERMINATED

    def add(self):
        for trial in self.trials:
            self.scheduler.on_trial_add(self, trial)

    def look(self, trial) -> str:
        """Train to the next look."""
        looks = trial.last_result.get("looks", [])
        share = (len(looks) + 1) / NUM_LOOKS
        trial.last_result = {"looks": [*looks, {"share": share, "eval_loss": self.losses[trial.trial_id] + 1 - share}]}
        self.num_looks += 1
        return self.scheduler.on_trial_result(self, trial, trial.last_result)

    def run(self, most_looks: int = 10_000) -> None:
        while self.num_looks < most_looks and (trial := self.scheduler.choose_trial_to_run(self)):
            trial.status = Trial.RUNNING
            while self.num_looks < most_looks:
                decision = self.look(trial)
                if trial.last_result["looks"][-1]["share"] >= 1:
                    trial.status = Trial.TERMINATED
                    break
                if decision == TrialScheduler.PAUSE:
                    trial.status = Trial.PAUSED
                    break

    def reached(self) -> list[int]:
        return [len(trial.last_result.get("looks", [])) for trial in self.trials]


class FakeTrial:
    """What the scheduler reads of a trial of Tune's."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id, self.status, self.last_result = trial_id, Trial.PENDING, {}

    def set_status(self, status):
        self.status = status


def asha(endless: bool = False, mode: str = "min", share: float = 0.33) -> Asha:
    return Asha("eval_loss", mode, reduction=3, share=share, endless=endless)


def test_nine_trials_cost_a_quarter_of_the_grid_and_the_best_gets_to_the_end():
    card = OneCard(asha(), [5, 3, 9, 1, 7, 8, 2, 6, 4])
    card.add()
    card.run()
    assert card.reached() == [1, 3, 1, 9, 1, 1, 3, 1, 1]
    assert card.num_looks == 21
    assert {trial.status for trial in card.trials} == {Trial.TERMINATED}


def test_what_halving_leaves_of_its_share_takes_the_best_that_wait_to_the_end():
    losses = [5, 3, 9, 1, 7, 8, 2, 6, 4, 10, 11, 12, 13, 14, 15]
    card = OneCard(asha(), losses)
    card.add()
    card.run()
    assert sorted(zip(losses, card.reached(), strict=True))[:6] == [(1, 9), (2, 9), (3, 9), (4, 3), (5, 3), (6, 1)]
    assert card.num_looks / (len(losses) * NUM_LOOKS) <= 0.33
    frugal, all_of_it = OneCard(asha(share=0.01), losses), OneCard(asha(share=1.0), losses)
    for card in (frugal, all_of_it):
        card.add()
        card.run()
    assert (frugal.reached().count(NUM_LOOKS), all_of_it.reached().count(NUM_LOOKS)) == (1, len(losses))


def test_who_runs_to_the_end_counts_as_if_there_already_and_the_others_wait_for_it():
    card = OneCard(asha(), [5, 3, 9, 1, 7, 8, 2, 6, 4, 10, 11, 12, 13, 14, 15])
    card.add()
    card.run()
    waits = next(trial for trial in card.trials if len(trial.last_result["looks"]) == 3)
    runs = card.trials[3]
    card.scheduler.on_trial_result(card, runs, {"looks": runs.last_result["looks"][:4]})
    runs.status, waits.status = Trial.RUNNING, Trial.PAUSED
    assert card.scheduler.choose_trial_to_run(card) is None, "another would not fit beside it"
    assert waits.status == Trial.PAUSED, "it may be wanted, if the other fails"
    runs.status = Trial.TERMINATED
    card.scheduler.on_trial_result(card, runs, {"reason": "out of memory"})
    assert card.scheduler.choose_trial_to_run(card) is waits


def test_a_trial_that_failed_is_no_part_of_the_grid_that_the_share_is_of():
    card = OneCard(asha(), [*range(15)])
    card.add()
    for trial in card.trials[9:]:
        card.scheduler.on_trial_result(card, trial, {"reason": "out of memory"})
        trial.status = Trial.ERROR
    card.run()
    assert card.reached()[:9] == [9, 3, 3, 1, 1, 1, 1, 1, 1]


def test_few_trials_still_bring_one_to_the_end():
    card = OneCard(asha(), [2, 1])
    card.add()
    card.run()
    assert card.reached() == [1, 9]


def test_the_largest_is_best_where_the_config_says_so():
    card = OneCard(asha(mode="max"), [1, 2, 3])
    card.add()
    card.run()
    assert card.reached() == [1, 1, 9]


@pytest.mark.parametrize("killed_after", range(1, 21))
def test_a_sweep_that_is_killed_and_resumed_decides_as_if_nothing_had_been(killed_after):
    losses = [5, 3, 9, 1, 7, 8, 2, 6, 4]
    card = OneCard(asha(), losses)
    card.add()
    card.run(killed_after)
    resumed = OneCard(asha(), losses)
    resumed.trials = card.trials
    for trial in resumed.trials:
        if trial.status != Trial.TERMINATED:
            trial.status = Trial.PENDING  # as Tune restores them
    resumed.add()
    resumed.run()
    assert resumed.reached() == [1, 3, 1, 9, 1, 1, 3, 1, 1]


def test_a_sweep_that_began_before_there_was_a_share_goes_on():
    card = OneCard(asha(), [5, 3, 9, 1, 7, 8, 2, 6, 4])
    card.add()
    card.run(9)
    kept = {name: value for name, value in card.scheduler.__dict__.items() if name not in ("share", "shares", "end")}
    card.scheduler = Asha.__new__(Asha)
    card.scheduler.__setstate__(kept)
    card.add()
    card.run()
    assert card.reached() == [1, 3, 1, 9, 1, 1, 3, 1, 1]


def test_a_resumed_sweep_leaves_what_failed_out_of_the_grid():
    card = OneCard(asha(), [*range(15)])
    for trial in card.trials[9:]:
        trial.last_result, trial.status = {"reason": "out of memory"}, Trial.TERMINATED
    card.add()
    card.run()
    assert card.reached()[:9] == [9, 3, 3, 1, 1, 1, 1, 1, 1]


def test_a_trial_without_a_number_for_its_loss_never_goes_on():
    card = OneCard(asha(), [float("nan"), 2, 1, 3])
    card.add()
    card.run()
    assert card.reached() == [1, 1, 9, 1]


def test_a_trial_that_loses_its_number_midway_leaves_its_place_to_others():
    card = OneCard(asha(share=1.0), [1, 2, 3, 4, 5, 6])
    card.add()
    card.run(6)
    for trial in card.trials[:2]:
        card.losses[trial.trial_id] = float("nan")
    card.run()
    assert card.reached() == [3, 3, 9, 9, 9, 9]
    assert {trial.status for trial in card.trials} == {Trial.TERMINATED}


def test_where_new_trials_never_end_the_best_that_wait_come_first():
    card = OneCard(asha(endless=True), [3, 2, 1, 4])
    card.add()
    card.run(4)
    assert card.reached() == [1, 1, 2, 0]
