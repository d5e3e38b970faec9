"""Settings that guard something: where secrets are read, and what excludes each other."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from configs.errors import ConfigError
from configs.schema import ChatbotConfig, Environment


def test_a_jobs_copy_of_the_checkout_reads_the_checkouts_own_secrets(home, tmp_path, monkeypatch):
    monkeypatch.delenv("TANDEM_CHECKOUT", raising=False)
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / ".env").write_text("HUGGINGFACE_TOKEN=hf_of_the_checkout\n")
    assert Environment().huggingface_token is None
    monkeypatch.setenv("TANDEM_CHECKOUT", str(tmp_path / "checkout"))
    token = Environment().huggingface_token
    assert token is not None
    assert token.get_secret_value() == "hf_of_the_checkout"


@pytest.fixture
def secrets(home, tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "secrets"
    folder.mkdir()
    monkeypatch.setattr("configs.schema.environment.SECRETS_FOLDER", folder)
    monkeypatch.delenv("TANDEM_TOKEN", raising=False)
    return folder


def test_a_containers_secrets_are_read_from_files(secrets):
    (secrets / "tandem_token").write_text("t" * 40 + "\n")
    found = Environment().tandem_token
    assert found is not None
    assert found.get_secret_value() == "t" * 40


def test_a_secret_that_cannot_be_read_is_told_and_a_folder_for_others_is_left_alone(secrets, monkeypatch):
    (secrets / "tandem_token").write_bytes(b"\xff" * 40)
    with pytest.raises(ConfigError, match="cannot be read"):
        Environment()
    monkeypatch.setattr(os, "access", lambda *_: False)  # as of a folder that only root may list, and tests may be root
    assert Environment().tandem_token is None


def test_a_base_is_in_4_bit_or_multiplies_in_fp8():
    def made(**train: str) -> ChatbotConfig:
        return ChatbotConfig.model_validate({"name": "bot", "data": {"source": "x"}, "train": train})

    assert made().train.precision == "auto"
    assert made(precision="fp8", quantization="none").train.precision == "fp8"
    with pytest.raises(ValidationError, match=r"precision=fp8 needs the base's own weights, not train\.quantization=nf4"):
        made(precision="fp8", quantization="nf4")
