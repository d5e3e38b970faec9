"""Asynchronous successive halving as its paper has it: all trials train a little, and only the best of them go on.

Ray's own ASHA never pauses a trial: whatever comes first on a card runs to its end, and on one card that costs about twice the tokens.
Here a trial that reached a rung waits, without a card, until it is among the best of that rung; then it goes on from its checkpoint.
Halving costs less than the sweep may, and trials that are as good as each other at a rung may end far apart: what it leaves takes the best
that wait to the end. What is known is what the trials' last results say, so a resumed sweep needs nothing else.
"""

import math
from collections.abc import Set
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from configs.schema import BudgetConfig
from tune.looks import Looks, failed

ROUNDING = 1e-9


class Asha(FIFOScheduler):  # type: ignore[misc]
    """Pauses trials at rungs, and promotes the best.

    Args:
        metric: What trials are compared by.
        mode: `min` or `max`.
        reduction: Of so many trials at a rung one goes on, to the next rung, so many times as far.
        share: Of what every trial to its end would cost, so much may be spent; one gets there in any case.
        endless: Whether there are always new trials, because tokens or hours are what is limited.
    """

    def __init__(self, metric: str, mode: str, reduction: int, share: float, endless: bool) -> None:
        super().__init__()
        self.compared_by, self.sign, self.reduction, self.endless = metric, 1.0 if mode == "max" else -1.0, reduction, endless
        self.share = share
        self.rungs = (reduction**-2, 1 / reduction, 1.0)  # shares of a run
        self.end = len(self.rungs) - 1
        self.scores: dict[str, list[float]] = {}  # of each trial, at the rungs that it reached; higher is better
        self.shares: dict[str, float] = {}  # how far each trial is
        self.goals: dict[str, int] = {}  # the rung that each trial may train to

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state that Tune kept of a sweep, which may have begun before there was a share."""
        self.__dict__.update({"share": BudgetConfig().share, "shares": {}, "end": len(state["rungs"]) - 1} | state)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Take a new trial, or one of a resumed sweep with what it reached before."""
        if failed(trial.last_result or {}):
            return
        looks = (trial.last_result or {}).get("looks", [])
        self._take(trial.trial_id, looks)
        if trial.trial_id in self.goals:  # its worker died, and it goes on
            return
        num_reached = len(self.scores[trial.trial_id])
        waits = num_reached > 0 and self._num_reached(looks[:-1]) < num_reached
        self.goals[trial.trial_id] = num_reached - 1 if waits else num_reached
        if waits and trial.status == Trial.PENDING:
            trial.set_status(Trial.PAUSED)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Pause a trial at the rung that it may train to; the last one is the end of its run."""
        if failed(result):
            self.shares.pop(trial.trial_id, None)  # it is no part of the grid
            return str(TrialScheduler.CONTINUE)
        num_reached = self._take(trial.trial_id, result["looks"])
        pause = self.goals[trial.trial_id] < num_reached < len(self.rungs)
        return str(TrialScheduler.PAUSE if pause else TrialScheduler.CONTINUE)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Choose a new trial while there are any, so that all are known at the first rung; then the best that wait.

        Where new ones never end, the best that wait come first.
        """
        trials: list[Trial] = tune_controller.get_trials()
        pending = next((trial for trial in trials if trial.status == Trial.PENDING), None)
        if pending and not self.endless:
            return pending
        waiting = {trial.trial_id: trial for trial in trials if trial.status == Trial.PAUSED}
        best = self._best_waiting(waiting.keys())
        if best:
            self.goals[best] = len(self.scores[best])
            return waiting[best]
        running = {trial.trial_id for trial in trials if trial.status == Trial.RUNNING}
        is_halved = not pending and tune_controller.search_alg.is_finished() and all(self.goals[at] == self.end for at in running)
        if not waiting or not is_halved:
            return pending
        if best := self._one_to_the_end(waiting.keys(), running):
            self.goals[best] = self.end
            return waiting[best]
        for trial in () if running else waiting.values():  # one that runs may still fail
            tune_controller.stop_trial(trial)
        return None

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Leave out of the grid whoever failed for good."""
        self.shares.pop(trial.trial_id, None)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Keep its scores: the others are measured by them."""

    def _take(self, trial_id: str, looks: Looks) -> int:
        """Note a trial's score at each rung that it reached; return their number."""
        reached = [next((look for look in looks if look["share"] >= rung - ROUNDING), None) for rung in self.rungs]
        scores = [self.sign * look[self.compared_by] for look in reached if look]
        self.shares[trial_id] = looks[-1]["share"] if looks else 0.0
        self.scores[trial_id] = [-math.inf if math.isnan(score) else score for score in scores]
        return len(self.scores[trial_id])

    def _num_reached(self, looks: Looks) -> int:
        return sum(any(look["share"] >= rung - ROUNDING for look in looks) for rung in self.rungs)

    def _best_waiting(self, waiting: Set[str]) -> str | None:
        """Return who is to go on: of the highest rung that has somebody among its best."""
        for rung in reversed(range(self.end)):
            there = sorted(
                (trial_id for trial_id, scores in self.scores.items() if len(scores) > rung), key=lambda at: -self.scores[at][rung]
            )
            for trial_id in there[: len(there) // self.reduction]:
                if trial_id in waiting and self.goals[trial_id] == rung and self._is_sound(trial_id):
                    return trial_id
        return None

    def _one_to_the_end(self, waiting: Set[str], running: Set[str]) -> str | None:
        """Return the best that waits at the highest rung, if enough is left for it; the first one gets there whatever it costs."""
        sound = [trial_id for trial_id in waiting if self._is_sound(trial_id)]
        if not sound:
            return None
        best = max(sound, key=lambda trial_id: (len(self.scores[trial_id]), self.scores[trial_id][-1]))
        is_first = not any(len(scores) > self.end and scores[-1] > -math.inf for scores in self.scores.values())
        if is_first and not running:
            return best
        spent = sum(1.0 if trial_id in running else share for trial_id, share in self.shares.items())
        return best if spent + 1.0 - self.shares[best] <= self.share * len(self.shares) else None

    def _is_sound(self, trial_id: str) -> bool:
        """Whether its last score is a number: a loss that is none does not become one."""
        return self.scores[trial_id][-1] > -math.inf
