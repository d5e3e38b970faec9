"""The record of a run in MLflow: what went in, where it came from, how it ended.

Knows MLflow's runs. Does not know how training works.
"""

import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.errors import RunError
from configs.loader import ROOT, setting_paths
from configs.schema import ChatbotConfig
from data.prepare import Prepared

FINISHED, STOPPED, FAILED = "FINISHED", "KILLED", "FAILED"
MAX_PARAM_LETTERS = 500
CONFIG_FILE = "config.json"


class Record:
    """One MLflow run of a chatbot's experiment."""

    def __init__(self, client: Any, run_id: str) -> None:
        self.client, self.run_id = client, run_id

    @classmethod
    def begin(cls, client: Any, config: ChatbotConfig, data: Prepared, base_fingerprint: str) -> "Record":
        """Start a run, with every parameter, the fingerprints, the commit and the environment."""
        from mlflow.entities import Param, RunTag

        experiment = client.get_experiment_by_name(config.name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(config.name)
        run = client.create_run(experiment_id)
        record = cls(client, run.info.run_id)
        facts = {
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
        client.log_batch(record.run_id, params=params, tags=[RunTag(name, text) for name, text in facts.items()])
        record.attach("environment.txt", "\n".join(sorted({f"{found.name}=={found.version}" for found in distributions()})))
        record.attach(CONFIG_FILE, config.model_dump_json(indent=2))
        return record

    @classmethod
    def resume(cls, client: Any, run_id: str) -> tuple["Record", ChatbotConfig]:
        """Take up a run that was stopped or failed, with the config it began with.

        Raises:
            RunError: There is no such run, or it is finished.
        """
        from mlflow.exceptions import MlflowException

        try:
            run = client.get_run(run_id)
            with tempfile.TemporaryDirectory() as folder:
                config = ChatbotConfig.model_validate_json(Path(client.download_artifacts(run_id, CONFIG_FILE, folder)).read_text())
        except ValidationError as error:
            what = f"run {run_id} cannot be resumed: its config is of another version of Tandem"
            raise RunError(what, str(error), "leave out --resume to train anew") from None
        except MlflowException as error:
            raise RunError(f"no run {run_id} to resume", str(error), "take the run's id from MLflow, or leave out --resume") from None
        if run.info.status == FINISHED:
            raise RunError(f"run {run_id} is finished", "there is nothing left to do", "leave out --resume to train anew")
        client.set_terminated(run_id, "RUNNING")
        return cls(client, run_id), config

    def attach(self, name: str, text: str) -> None:
        """Keep a text with the run."""
        self.client.log_text(self.run_id, text, name)

    def end(self, status: str, reason: str = "") -> None:
        """Mark how the run ended."""
        if reason:
            self.client.set_tag(self.run_id, "reason", reason[:MAX_PARAM_LETTERS])
        self.client.set_terminated(self.run_id, status)


def config_fingerprint(config: ChatbotConfig) -> str:
    """Return 16 hex digits that change with any setting of data, model or training."""
    return hashlib.sha256(config.model_dump_json(exclude={"serve"}).encode()).hexdigest()[:16]


def flat_settings(config: ChatbotConfig) -> Iterator[tuple[str, str]]:
    """Yield every setting as dotted path and text."""
    for path, _ in setting_paths(ChatbotConfig):
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)
        if not hasattr(value, "model_fields"):
            yield path, str(value)


def git_commit() -> str:
    """Return the checkout's commit, marked where files differ from it; `unknown` outside git.

    A Ray job runs in a copy without git's folder, so the stack names its checkout in TANDEM_CHECKOUT.
    """
    git = ["git", "-C", os.environ.get("TANDEM_CHECKOUT", str(ROOT))]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-changed" if changed else commit
