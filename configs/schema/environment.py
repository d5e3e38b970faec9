"""Secrets and places, which belong to no config file: from the environment, `.env`, or a container's secret files."""

import os
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from configs.errors import ConfigError

SECRETS_FOLDER = Path("/run/secrets")  # where containers find theirs, a file each


class SecretFiles(SecretsSettingsSource):
    """A container's secrets, a file each."""

    def __call__(self) -> dict[str, Any]:
        """Read those that are there.

        Raises:
            ConfigError: One of ours cannot be read.
        """
        try:
            return super().__call__()
        except SettingsError as error:
            why = f"{error.__cause__ or error}"
            raise ConfigError(f"a secret in {SECRETS_FOLDER} cannot be read", why, f"let user {os.getuid()} read the file") from None


class Environment(BaseSettings):
    """Secrets and places, from the environment or from `.env`."""

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read `.env` of the checkout, whose copy in a Ray job has none: secrets are not uploaded; and a container's secret files."""
        checkout = Path(os.environ.get("TANDEM_CHECKOUT", "."))
        dotenv = DotEnvSettingsSource(settings_cls, env_file=checkout / ".env", env_ignore_empty=True)
        # A machine may have such a folder for others than us.
        has_files = SECRETS_FOLDER.is_dir() and os.access(SECRETS_FOLDER, os.R_OK | os.X_OK)
        files = (SecretFiles(settings_cls, secrets_dir=SECRETS_FOLDER),) if has_files else ()
        return init_settings, env_settings, dotenv, *files

    huggingface_token: SecretStr | None = None
    """Token for gated models of the Hugging Face hub."""
    mlflow_tracking_uri: str | None = None
    """Another MLflow server; `up` starts none then."""
    feedback_url: SecretStr | None = None
    """SQLAlchemy URL of the database for feedback; `feedback.db` inside TANDEM_HOME if empty."""
    tandem_token: SecretStr | None = None
    """Token of the cluster, 32 letters or more, the same on each machine; `up` makes one in TANDEM_HOME if empty."""
    tandem_api_key: SecretStr | None = None
    """Key for our own endpoint; on the cluster's machine none is needed."""
    judge_api_key: SecretStr | None = None
    """Key for the endpoint of `evaluation.judge`."""
    base_model_name: str | None = None
    """Overrides `model.name` of every config."""
    tandem_home: Path = Path(".tandem")
    """Folder for everything that a run leaves behind."""
    log_dir: Path | None = None
    """Folder for logs; `logs` inside TANDEM_HOME if empty."""
