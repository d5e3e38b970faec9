"""Settings that guard something: where secrets are read."""

from configs.schema import Environment


def test_a_jobs_copy_of_the_checkout_reads_the_checkouts_own_secrets(home, tmp_path, monkeypatch):
    monkeypatch.delenv("TANDEM_CHECKOUT", raising=False)
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / ".env").write_text("HUGGINGFACE_TOKEN=hf_of_the_checkout\n")
    assert Environment().huggingface_token is None
    monkeypatch.setenv("TANDEM_CHECKOUT", str(tmp_path / "checkout"))
    token = Environment().huggingface_token
    assert token is not None
    assert token.get_secret_value() == "hf_of_the_checkout"
