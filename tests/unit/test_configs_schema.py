"""Settings that guard something: where the endpoint listens, where secrets are read."""

import pytest
from pydantic import ValidationError

from configs.schema import Environment, ServeConfig


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_an_address_that_others_reach_is_refused_while_there_are_no_keys(host):
    with pytest.raises(ValidationError, match="there are no API keys yet"):
        ServeConfig(host=host)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_is_allowed(host):
    assert ServeConfig(host=host).host == host


def test_a_jobs_copy_of_the_checkout_reads_the_checkouts_own_secrets(home, tmp_path, monkeypatch):
    monkeypatch.delenv("TANDEM_CHECKOUT", raising=False)
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / ".env").write_text("HUGGINGFACE_TOKEN=hf_of_the_checkout\n")
    assert Environment().huggingface_token is None
    monkeypatch.setenv("TANDEM_CHECKOUT", str(tmp_path / "checkout"))
    token = Environment().huggingface_token
    assert token is not None
    assert token.get_secret_value() == "hf_of_the_checkout"
