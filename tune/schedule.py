"""From the words of a config to Ray Tune's own parts: what is drawn, who goes on, and when it ends.

Knows Ray Tune's searchers and schedulers. Does not know what a trial does.
"""

import random
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining
from ray.tune.search.basic_variant import BasicVariantGenerator

from configs.errors import RunError
from configs.schema import Dimension, SweepConfig
from configs.space import num_combinations
from tune.asha import Asha
from tune.record import trial_name

NUM_LOOKS_APART = 2  # PBT lets bad trials copy good ones each so many looks
BELOW = 0.999  # so that rounding never puts a look just below its rung


def make_search(sweep: SweepConfig, num_at_once: int) -> tuple[dict[str, Any], ray_tune.TuneConfig]:
    """Return Tune's space and settings for a checked config."""
    space = {path: _domain(dimension) for path, dimension in sweep.space.items()}
    name = partial(_name, first=0 if sweep.scheduler == "optuna" else 1)
    settings: dict[str, Any] = {"metric": sweep.metric, "mode": sweep.mode, "trial_name_creator": name, "trial_dirname_creator": name}
    settings["reuse_actors"] = True  # a process that has loaded its libraries serves trial after trial
    points = _points(sweep)
    if points is not None:
        settings |= {"search_alg": BasicVariantGenerator(), "scheduler": _scheduler(sweep, endless=False)}
        return {"settings": ray_tune.grid_search(points)}, ray_tune.TuneConfig(**settings)
    settings["num_samples"] = sweep.budget.trials or -1
    settings["scheduler"] = _scheduler(sweep, endless=sweep.budget.trials is None)
    if sweep.scheduler == "optuna":
        settings |= {"search_alg": _optuna(sweep), "max_concurrent_trials": num_at_once}
    else:
        settings["search_alg"] = BasicVariantGenerator(random_state=sweep.seed)
    return {"settings": space}, ray_tune.TuneConfig(**settings)


def _points(sweep: SweepConfig) -> list[dict[str, Any]] | None:
    """Return what is tried where it can be listed: combinations of choices, in a random order, each once."""
    if num_combinations(sweep) is None or sweep.scheduler in ("pbt", "optuna"):
        return None
    choices = [dimension.choice or [] for dimension in sweep.space.values()]
    points = [dict(zip(sweep.space, values, strict=True)) for values in product(*choices)]
    random.Random(sweep.seed).shuffle(points)  # noqa: S311 - no secret
    return points[: sweep.budget.trials]


def _domain(dimension: Dimension) -> Any:
    if dimension.choice is not None:
        return ray_tune.choice(dimension.choice)
    if dimension.integer:
        return ray_tune.randint(dimension.integer[0], dimension.integer[1] + 1)
    if dimension.log:
        return ray_tune.loguniform(*dimension.log)
    assert dimension.uniform
    return ray_tune.uniform(*dimension.uniform)


def _scheduler(sweep: SweepConfig, endless: bool) -> Any:
    if sweep.scheduler == "asha":
        return Asha(sweep.metric, sweep.mode, sweep.reduction, sweep.budget.share, endless)
    if sweep.scheduler == "optuna":
        # A searcher learns from trials that ended, so these are stopped, not paused.
        return ASHAScheduler(time_attr="share", max_t=1, grace_period=BELOW * sweep.reduction**-2, reduction_factor=sweep.reduction)
    if sweep.scheduler == "pbt":
        mutations = {path: dimension.choice or _domain(dimension) for path, dimension in sweep.space.items()}
        return PopulationBasedTraining(
            time_attr="training_iteration",
            perturbation_interval=NUM_LOOKS_APART,
            hyperparam_mutations={"settings": mutations},
            custom_explore_fn=_Clip(sweep.space),
            log_config=False,
        )
    return FIFOScheduler()


class _Clip:
    """Keeps what PBT changed inside the space."""

    def __init__(self, space: dict[str, Dimension]) -> None:
        self.bounds = {path: dimension.uniform or dimension.log or dimension.integer for path, dimension in space.items()}

    def __call__(self, drawn: dict[str, Any]) -> dict[str, Any]:
        for path, bounds in self.bounds.items():
            if bounds:
                drawn["settings"][path] = min(max(drawn["settings"][path], bounds[0]), bounds[1])
        return drawn


def _optuna(sweep: SweepConfig) -> Any:
    if find_spec("optuna") is None:
        raise RunError("tune.scheduler=optuna needs Optuna", "the package optuna is not installed", "make setup, or tune.scheduler=asha")
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return OptunaSearch(seed=sweep.seed)


def _name(trial: Any, first: int) -> str:
    """Name a trial by its number, from 1; searchers count from 1 themselves."""
    return trial_name(int(trial.experiment_tag.partition("_")[0]) + first)


class Budget(ray_tune.Stopper):  # type: ignore[misc]
    """Ends a sweep whose trials have used up its tokens, or its hours of the cards; Tune keeps its state with the sweep's."""

    def __init__(self, tokens: int | None, hours: float | None, trials_per_card: int = 1) -> None:
        # What trials count is their own time: an hour of a card is one of each trial on it.
        self.limits = {"num_tokens": tokens, "time_total_s": hours and 3600 * hours * trials_per_card}
        self.spent: dict[str, dict[str, float]] = {name: {} for name in self.limits}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Note what a trial has used; no single trial is ended."""
        for name, spent in self.spent.items():
            spent[trial_id] = max(result.get(name, 0), spent.get(trial_id, 0))
        return False

    def stop_all(self) -> bool:
        """Whether a limit is reached."""
        return any(limit and sum(self.spent[name].values()) >= limit for name, limit in self.limits.items())
