"""A sweep in MLflow: one run for the whole, and nested in it one for each trial.

Knows MLflow's runs. Does not know how a sweep goes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.home import write_text
from cluster.registry import Registry, mlflow_errors
from train.record import FAILED, FINISHED, KIND_TAG, MAX_PARAM_LETTERS, STOPPED, TRIAL, Record

if TYPE_CHECKING:
    from tune.outcome import Row

PARENT_TAG, NAME_TAG, TRIAL_TAG = "mlflow.parentRunId", "mlflow.runName", "trial"
NUM_TOKENS = "num_tokens"


def trial_name(number: int) -> str:
    """Return the name of a trial."""
    return f"trial_{number:05d}"


def trial_number(name: str) -> int:
    """Return the number in a trial's name."""
    return int(name.rpartition("_")[2])


def trial_run(url: str, sweep_id: str, name: str, settings: dict[str, Any]) -> str:
    """Return the run of a trial, begun at its first start; its parameters are the settings that vary."""
    from mlflow.entities import Param

    client = Registry(url).client
    with mlflow_errors(url):
        sweep = client.get_run(sweep_id)
        if known := find_runs(client, sweep).get(name):
            client.set_terminated(known, "RUNNING")
            return known
        tags = {PARENT_TAG: sweep_id, NAME_TAG: f"trial {trial_number(name)}", TRIAL_TAG: name, KIND_TAG: TRIAL}
        run_id: str = client.create_run(sweep.info.experiment_id, tags=tags).info.run_id
        client.log_batch(run_id, params=[Param(path, str(value)[:MAX_PARAM_LETTERS]) for path, value in settings.items()])
    return run_id


class Spent:
    """Counts the tokens that a trial trained itself, over all its starts: in its run, since PBT gives it another one's checkpoints."""

    def __init__(self, client: Any, run_id: str) -> None:
        self.client, self.run_id = client, run_id
        self.num_tokens = int(client.get_run(run_id).data.metrics.get(NUM_TOKENS, 0))

    def add(self, num_tokens: float) -> int:
        """Add what was trained since the last look; return the sum."""
        self.num_tokens += int(num_tokens)
        self.client.log_metric(self.run_id, NUM_TOKENS, self.num_tokens)
        return self.num_tokens


def find_runs(client: Any, sweep: Any) -> dict[str, str]:
    """Return the runs of a sweep's trials, by the trials' names."""
    runs = client.search_runs([sweep.info.experiment_id], f"tags.`{PARENT_TAG}` = '{sweep.info.run_id}'", max_results=10_000)
    return {run.data.tags[TRIAL_TAG]: run.info.run_id for run in runs if TRIAL_TAG in run.data.tags}


def close_trials(client: Any, sweep_id: str, rows: "Sequence[Row]") -> dict[str, str]:
    """Mark how each trial ended, with its score; return their runs, by the trials' names."""
    states = {"finished": FINISHED, "stopped": STOPPED, "failed": FAILED}
    with mlflow_errors(client.tracking_uri):
        known = find_runs(client, client.get_run(sweep_id))
        for row in rows:
            if run_id := known.get(row.name):
                Record(client, run_id).end(states[row.state], row.reason or f"{row.share:.0%} of a run")
                figures = {"score": row.score, NUM_TOKENS: row.num_tokens, "share": row.share}
                for name, value in figures.items():
                    if value is not None:
                        client.log_metric(run_id, name, value)
    return known


def write_summary(client: Any, sweep_id: str, folder: Path, rows: "Sequence[Row]", figures: Mapping[str, float]) -> None:
    """Write trials and figures beside the plots, and keep all of it with the sweep's run; a loss that is no number is null."""
    listed = []
    for row in rows:
        looks = [{name: value if math.isfinite(value) else None for name, value in look.items()} for look in row.looks]
        told = {"settings": row.settings, "score": row.score, "reason": row.reason, "looks": looks}
        listed.append({"trial": row.number, "state": row.state, **told})
    text = json.dumps({"figures": dict(figures), "trials": listed}, indent=2, allow_nan=False)
    write_text(folder / "trials.json", text + "\n")
    with mlflow_errors(client.tracking_uri):
        client.log_artifacts(sweep_id, str(folder), "summary")
        for name, value in figures.items():
            client.log_metric(sweep_id, name, value)
