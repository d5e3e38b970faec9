"""A sweep's space, tried against the schema before anything starts.

Knows which settings a sweep may vary, and why it may not vary the others. Does not know how a sweep searches.
"""

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from configs.loader import Source, chatbot_source, load_chatbot, mistakes_error, mistakes_with, nearest, setting_paths
from configs.schema import ChatbotConfig, Dimension, SweepConfig

BETWEEN = 0.381966  # a point inside a range that is no round number, so that a setting of whole numbers refuses it
# What another checkpoint can go on with: the adapter's shape and the order of rows cannot change in the midst of a run.
PBT_SETTINGS = ("train.learning_rate", "train.lora.dropout", "train.label_smoothing", "train.max_grad_norm")
MEASURED = "it changes how trials are measured and saved; see tune.num_looks"
REFUSED = {
    "train.num_workers": "a trial takes one card; more cards train more trials at once",
    "train.max_failures": "it does not change what is learned",
    "train.eval_every_steps": MEASURED,
    "train.log_every_steps": MEASURED,
    "train.checkpoint_every_steps": MEASURED,
    "train.num_checkpoints_kept": MEASURED,
    "train.early_stopping_patience": "tune.scheduler decides which trials stop early",
}
REFUSED_GROUPS = {
    "name": "a sweep is for one chatbot",
    "model": "a sweep is for one base model",
    "data": "trials are compared by the same held-out conversations; sweep each data set by itself",
    "serve": "it does not change what is learned",
    "evaluation": "it does not change what is learned",
    "gate": "it does not change what is learned",
    "tune": "it is the sweep itself",
}


def load_sweep(file: str | Path, overrides: Sequence[str] = ()) -> ChatbotConfig:
    """Read a chatbot's config for a sweep; every value that its space names is tried against the schema.

    Raises:
        ConfigError: All mistakes at once.
    """
    config = load_chatbot(file, overrides)
    source = chatbot_source(file, overrides)
    mistakes = list(_about_the_sweep(config, source))
    for path, dimension in config.tune.space.items():
        mistakes += _about_setting(path, dimension, config.tune, source)
    if mistakes:
        raise mistakes_error(source.file, list(dict.fromkeys(mistakes)), "`python -m configs schema` lists every setting")
    return config


def num_combinations(sweep: SweepConfig) -> int | None:
    """Return how many different trials a space of choices has; None where something is drawn from a range."""
    choices = [dimension.choice for dimension in sweep.space.values()]
    return None if None in choices else prod(len(choice or ()) for choice in choices)


def _about_the_sweep(config: ChatbotConfig, source: Source) -> Iterator[str]:
    sweep, budget, place = config.tune, config.tune.budget, source.place(("tune",))
    if not sweep.space:
        yield f"{place}: tune.space: is empty; name settings to vary, such as train.lora.rank: {{choice: [8, 16]}}"
        return
    combinations = num_combinations(sweep)
    if combinations is None:
        if sweep.scheduler == "grid":
            yield f"{place}: tune.scheduler=grid tries every combination, so each setting of tune.space must be a choice"
        elif not (budget.trials or budget.tokens or budget.hours):
            yield f"{place}: tune.budget: is missing; a range has no end: set tune.budget.trials, tokens or hours"
    if sweep.scheduler == "pbt" and not budget.trials:
        yield f"{place}: tune.budget.trials: is missing; with tune.scheduler=pbt it is the size of the population"
    if config.train.num_workers > 1:
        yield f"{source.place(('train', 'num_workers'))}: train.num_workers={config.train.num_workers}: {REFUSED['train.num_workers']}"


def _about_setting(path: str, dimension: Dimension, sweep: SweepConfig, source: Source) -> list[str]:
    place = source.place(("tune", "space", path))
    known = [name for name, info in setting_paths(ChatbotConfig) if not _is_group(info.annotation)]
    if path not in known:
        inside = [name for name in known if name.startswith(f"{path}.")]
        hint = f" is a group; name one of {', '.join(inside)}" if inside else " no such setting"
        near = "" if inside else nearest(path, known) or nearest(path.rpartition(".")[2], known, by_last=True)
        return [f"{place}: {path}:{hint}{f'; did you mean {near}?' if near else ''}"]
    reason = REFUSED.get(path) or REFUSED_GROUPS.get(path.partition(".")[0])
    if reason:
        return [f"{place}: {path}: cannot be varied: {reason}"]
    if sweep.scheduler == "pbt" and path not in PBT_SETTINGS:
        return [f"{place}: {path}: cannot change in the midst of a run; tune.scheduler=pbt can vary {', '.join(PBT_SETTINGS)}"]
    return [mistake for value in _samples(dimension) for mistake in mistakes_with(source, path, value, place)]


def _samples(dimension: Dimension) -> list[Any]:
    """Every choice; of a range both ends, and a value between where fractions can be drawn."""
    if dimension.choice is not None:
        return dimension.choice
    if dimension.integer:
        return list(dimension.integer)
    low, high = dimension.uniform or dimension.log or (0.0, 0.0)
    return [low, high, low + BETWEEN * (high - low)]


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
