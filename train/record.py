"""The record of a run in MLflow: what went in, where it came from, how it ended.

Knows MLflow's runs. Does not know how training works.
"""

import hashlib
import json
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cluster.logs import TRAINING, Logger, streams
from cluster.registry import Registry, Version, mlflow_errors
from cluster.versions import git_commit
from configs.errors import RunError
from configs.loader import setting_paths
from configs.schema import ChatbotConfig
from train.scores import Interval, shown_interval

if TYPE_CHECKING:
    from data.prepare import Prepared

FINISHED, STOPPED, FAILED = "FINISHED", "KILLED", "FAILED"
MAX_PARAM_LETTERS = 500
CONFIG_FILE = "config.json"
ENDS = {"": "value", "_low": "low", "_high": "high"}
KIND_TAG = "kind"
RUN, SWEEP, TRIAL = "run", "sweep", "trial"
# What each kind is called, and how it goes on.
KINDS = {
    RUN: ("a single run", "python -m train CONFIG --resume {}"),
    SWEEP: ("a sweep", "python -m tune CONFIG --resume {}"),
    TRIAL: ("a trial of a sweep", "python -m tune CONFIG --resume SWEEP, with the id of its parent"),
}
NO_SUCH_RUN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
DESCRIBED = {"data": "data", "base": "base model"}


def run_logger(run_id: str, **fields: str) -> Logger:
    """Return a logger whose lines say which run they are of."""
    return streams().logger(TRAINING).bind(run=run_id, **fields)


class Record:
    """One MLflow run of a chatbot's experiment."""

    def __init__(self, client: Any, run_id: str) -> None:
        self.client, self.run_id = client, run_id

    @classmethod
    def create(cls, client: Any, chatbot: str) -> "Record":
        """Start a run of which nothing is told yet."""
        with mlflow_errors(client.tracking_uri):
            return cls(client, client.create_run(_experiment_id(client, chatbot)).info.run_id)

    def describe(self, config: ChatbotConfig, data: "Prepared", base_fingerprint: str, kind: str = RUN) -> None:
        """Tell what a run, or a sweep, begins with: every parameter, the fingerprints, the commit and the environment."""
        from mlflow.entities import Param, RunTag

        self.attach("environment.txt", "\n".join(sorted({f"{found.name}=={found.version}" for found in distributions()})))
        self.attach(CONFIG_FILE, config.model_dump_json(indent=2))
        facts = {
            KIND_TAG: kind,
            "data_fingerprint": data.fingerprint,
            "config_fingerprint": config_fingerprint(config),
            "base_fingerprint": base_fingerprint,
            "git_commit": git_commit(),
            "python": platform.python_version(),
            "host": platform.node(),
        }
        params = [Param(path, text[:MAX_PARAM_LETTERS]) for path, text in flat_settings(config)]
        params += [
            Param(f"data.{name}", str(getattr(data, name))) for name in ("num_train", "num_heldout", "num_train_tokens", "num_loss_tokens")
        ]
        with mlflow_errors(self.client.tracking_uri):  # last: what has a kind has all else, and can be resumed
            self.client.log_batch(self.run_id, params=params, tags=[RunTag(name, text) for name, text in facts.items()])
        run_logger(self.run_id).info("begun", chatbot=config.name, kind=kind)

    @classmethod
    def find(cls, client: Any, run_id: str, kind: str = RUN) -> tuple["Record", ChatbotConfig]:
        """Return a run of this kind that was stopped or failed, and the config it began with; `reopen` takes it up.

        Raises:
            RunError: There is no such run, it is of another kind, or it is finished.
        """
        from mlflow.exceptions import MlflowException

        with mlflow_errors(client.tracking_uri):
            try:
                run = client.get_run(run_id)
            except MlflowException as error:
                if error.error_code not in NO_SUCH_RUN:
                    raise
                raise RunError(f"no run {run_id} to resume", str(error), "take the run's id from MLflow, or leave out --resume") from None
        found = run.data.tags.get(KIND_TAG)
        if found != kind:
            called, remedy = KINDS.get(
                found,
                (
                    "none that this version of Tandem began, or one that was stopped as it began",
                    "take the run's id from MLflow, or leave out --resume",
                ),
            )
            raise RunError(f"run {run_id} is not {KINDS[kind][0]}", f"it is {called}", remedy.format(run_id))
        if run.info.status == FINISHED:
            raise RunError(f"run {run_id} is finished", "there is nothing left to do", "leave out --resume to train anew")
        return cls(client, run_id), read_config(client, run_id)

    def require_same(self, data: "Prepared", base_fingerprint: str) -> None:
        """Refuse to go on with another base model or other data than the run began with.

        Raises:
            RunError: One of them has changed.
        """
        with mlflow_errors(self.client.tracking_uri):
            tags = self.client.get_run(self.run_id).data.tags
        for name, now in (("data", data.fingerprint), ("base", base_fingerprint)):
            then = tags.get(f"{name}_fingerprint")
            if then != now:
                what = f"run {self.run_id} cannot be resumed: its {DESCRIBED[name]} changed"
                raise RunError(what, f"it began with {then}, and now there is {now}", "put it back, or leave out --resume to train anew")

    def reopen(self) -> None:
        """Mark that the run goes on."""
        run_logger(self.run_id).info("gone on with")
        with mlflow_errors(self.client.tracking_uri):
            self.client.set_terminated(self.run_id, "RUNNING")

    def attach(self, name: str, text: str) -> None:
        """Keep a text with the run."""
        with mlflow_errors(self.client.tracking_uri):
            self.client.log_text(self.run_id, text, name)

    def end(self, status: str, reason: str = "") -> None:
        """Mark how the run ended."""
        tell = run_logger(self.run_id)
        (tell.error if status == FAILED else tell.info)("ended", status=status, reason=reason)
        with mlflow_errors(self.client.tracking_uri):
            if reason:
                self.client.set_tag(self.run_id, "reason", reason[:MAX_PARAM_LETTERS])
            self.client.set_terminated(self.run_id, status)


def _experiment_id(client: Any, name: str) -> str:
    """Return the id of a chatbot's experiment, which is made with its first run; another process may be making it too."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return str(client.get_experiment_by_name(name).experiment_id)


def read_config(client: Any, run_id: str) -> ChatbotConfig:
    """Return the config that a run began with.

    Raises:
        RunError: It is of another version of Tandem.
    """
    with mlflow_errors(client.tracking_uri), tempfile.TemporaryDirectory() as folder:
        text = Path(client.download_artifacts(run_id, CONFIG_FILE, folder)).read_text()
    try:
        return ChatbotConfig.model_validate_json(text)
    except ValidationError as error:
        what = f"the config of run {run_id} is of another version of Tandem"
        raise RunError(what, str(error), "name the chatbot's config file, and train anew instead of resuming") from None


def keep_scores(
    registry: Registry, version: Version, scores: Mapping[str, Interval], differences: Mapping[str, Interval], page: str
) -> None:
    """Write an evaluation to a version: metrics and page to its run, the values with their intervals to its tags."""
    from mlflow.entities import Metric

    now_ms = int(time.time() * 1000)
    named = {f"eval/{name}": found for name, found in scores.items()} | {f"better/{name}": found for name, found in differences.items()}
    ends = {f"{name}{suffix}": getattr(found, end) for name, found in named.items() for suffix, end in ENDS.items()}
    client = registry.client
    with mlflow_errors(registry.url):
        client.log_batch(version.run_id, metrics=[Metric(name, value, now_ms, 0) for name, value in ends.items()])
    registry.write_evaluation(version, page)
    values = {name: asdict(found) for name, found in scores.items()}
    registry.note(version, {name: shown_interval(name, found) for name, found in scores.items()} | {"evaluation": json.dumps(values)})


def config_fingerprint(config: ChatbotConfig) -> str:
    """Return 16 hex digits that change with any setting of data, model or training."""
    return hashlib.sha256(config.model_dump_json(exclude={"serve", "evaluation", "gate", "tune"}).encode()).hexdigest()[:16]


def flat_settings(config: ChatbotConfig) -> Iterator[tuple[str, str]]:
    """Yield every setting as dotted path and text."""
    for path, _ in setting_paths(ChatbotConfig):
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)
        if not hasattr(value, "model_fields"):
            yield path, str(value)
