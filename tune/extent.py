"""How far a sweep is, and how far it is likely to go, from what its trials told last.

Knows what each scheduler lets its trials do. Does not know Ray, or who shows it.
"""

from collections.abc import Sequence
from typing import Any

from cluster.job_queue import PARTS_A_RUN
from configs.schema import SweepConfig
from configs.space import num_combinations
from tune.looks import failed
from tune.record import NUM_TOKENS

HOUR_S = 3600
ROUNDING = 1e-9


def how_far(results: Sequence[dict[str, Any]], sweep: SweepConfig, trials_per_card: int) -> tuple[int, int]:
    """Return how much is trained, and how much will likely be, in parts of a run; 0 where the end cannot be told.

    Args:
        results: The newest of each trial; empty where it has none.
        sweep: The sweep's settings.
        trials_per_card: Trials whose time passes at once.
    """
    sound = [result for result in results if not failed(result)]
    done = sum(result["looks"][-1]["share"] for result in sound if result.get("looks"))
    spent = [
        (sum(result.get(NUM_TOKENS, 0) for result in results), sweep.budget.tokens),
        (sum(result.get("time_total_s", 0) for result in results), (sweep.budget.hours or 0) * HOUR_S * trials_per_card),
    ]
    ends = [done * limit / used for used, limit in spent if used and limit]  # where it is when that is used up, at this pace
    if num_trials := _num_trials(sweep):
        ends.append(likely_runs(sweep, num_trials - (len(results) - len(sound))))
    trained, likely = (round(PARTS_A_RUN * runs) for runs in (done, min(ends) if ends and all(ends) else 0))
    return min(trained, likely or trained), likely


def likely_runs(sweep: SweepConfig, num_trials: int) -> float:
    """Return how much so many trials are likely to train, in runs; 0 where it cannot be told."""
    if sweep.scheduler == "optuna" or num_trials <= 0:  # whom it stops depends on what it proposes
        return 0.0
    if sweep.scheduler != "asha":
        return float(num_trials)
    at_second, at_end = max(1, num_trials // sweep.reduction), max(1, num_trials // sweep.reduction**2)
    first, second = sweep.reduction**-2, 1 / sweep.reduction
    runs = num_trials * first + at_second * (second - first) + at_end * (1 - second)
    for rest in [1 - second] * (at_second - at_end) + [1 - first] * (num_trials - at_second):
        if runs + rest > sweep.budget.share * num_trials + ROUNDING:
            break
        runs += rest  # one more of those that wait is taken to the end
    return runs


def _num_trials(sweep: SweepConfig) -> int | None:
    """Return how many trials there will be, where they are counted."""
    combinations = num_combinations(sweep) if sweep.scheduler in ("asha", "grid") else None
    return min((number for number in (combinations, sweep.budget.trials) if number), default=None)
