"""Asynchronous successive halving as its paper has it: all trials train a little, and only the best of them go on.

Ray's own ASHA never pauses a trial: whatever comes first on a card runs to its end, and on one card that costs about twice the tokens.
Here a trial that reached a rung waits, without a card, until it is among the best of that rung; then it goes on from its checkpoint.
What is known is what the trials' last results say, so a resumed sweep needs nothing else.
"""

import math
from collections.abc import Set
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from tune.looks import Looks, failed

ROUNDING = 1e-9


class Asha(FIFOScheduler):  # type: ignore[misc]
    """Pauses trials at rungs, and promotes the best.

    Args:
        metric: What trials are compared by.
        mode: `min` or `max`.
        reduction: Of so many trials at a rung one goes on, to the next rung, so many times as far.
        endless: Whether there are always new trials, because tokens or hours are what is limited.
    """

    def __init__(self, metric: str, mode: str, reduction: int, endless: bool) -> None:
        super().__init__()
        self.compared_by, self.sign, self.reduction, self.endless = metric, 1.0 if mode == "max" else -1.0, reduction, endless
        self.rungs = (reduction**-2, 1 / reduction, 1.0)  # shares of a run
        self.scores: dict[str, list[float]] = {}  # of each trial, at the rungs that it reached; higher is better
        self.goals: dict[str, int] = {}  # the rung that each trial may train to

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Take a new trial, or one of a resumed sweep with what it reached before."""
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
        busy = any(trial.status == Trial.RUNNING for trial in trials) or not tune_controller.search_alg.is_finished()
        if best is None and waiting and not pending and not busy:
            best = self._one_to_the_end(waiting.keys())
            for trial in () if best else waiting.values():
                tune_controller.stop_trial(trial)
        if best is None:
            return pending
        self.goals[best] = len(self.scores[best])
        return waiting[best]

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Keep its scores: the others are measured by them."""

    def _take(self, trial_id: str, looks: Looks) -> int:
        """Note a trial's score at each rung that it reached; return their number."""
        reached = [next((look for look in looks if look["share"] >= rung - ROUNDING), None) for rung in self.rungs]
        scores = [self.sign * look[self.compared_by] for look in reached if look]
        self.scores[trial_id] = [-math.inf if math.isnan(score) else score for score in scores]
        return len(self.scores[trial_id])

    def _num_reached(self, looks: Looks) -> int:
        return sum(any(look["share"] >= rung - ROUNDING for look in looks) for rung in self.rungs)

    def _best_waiting(self, waiting: Set[str]) -> str | None:
        """Return who is to go on: of the highest rung that has somebody among its best."""
        for rung in reversed(range(len(self.rungs) - 1)):
            there = sorted(
                (trial_id for trial_id, scores in self.scores.items() if len(scores) > rung), key=lambda at: -self.scores[at][rung]
            )
            for trial_id in there[: len(there) // self.reduction]:
                if trial_id in waiting and self.goals[trial_id] == rung:
                    return trial_id
        return None

    def _one_to_the_end(self, waiting: Set[str]) -> str | None:
        """Return the best that wait at the highest rung, where there were too few trials for any to reach the end."""
        if any(len(scores) == len(self.rungs) for scores in self.scores.values()):
            return None
        return max(waiting, key=lambda trial_id: (len(self.scores[trial_id]), self.scores[trial_id][-1]))
