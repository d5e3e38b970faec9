"""Keys: shown once, kept as hashes, and never written half."""

import json
import threading

import pytest
from typer.testing import CliRunner

from cluster.home import write_text
from cluster.session import operator_key, token_file
from configs.errors import AccessError
from configs.schema import is_loopback
from serve.__main__ import app
from serve.keys import KeyFile, day


@pytest.fixture
def keys(home) -> KeyFile:
    return KeyFile()


def test_the_file_has_no_secret_and_is_its_owners(keys):
    secret = keys.create("alice", ["helpdesk"])
    assert secret.startswith("sk-tandem-")
    assert secret not in keys.file.read_text()
    assert keys.file.stat().st_mode & 0o777 == 0o600
    key = KeyFile().read()[0]
    assert (key.name, key.models, key.is_valid()) == ("alice", ("helpdesk",), True)
    reader = KeyFile()
    reader.read()
    assert reader.find(secret) == key
    assert reader.find(secret + "x") is None


def test_a_name_is_taken_while_its_key_is_valid(keys):
    keys.create("alice")
    with pytest.raises(AccessError, match="already"):
        keys.create("alice")
    keys.revoke("alice")
    keys.create("alice")
    assert [key.revoked for key in keys.read()] == [True, False]
    first_s = keys.read()[0].revoked_s
    keys.revoke("alice")
    assert keys.read()[0].revoked_s == first_s, "the first one's day stays"


@pytest.mark.parametrize(("name", "models"), [("", None), ("a b", None), ("a" * 65, None), ("alice", [""]), ("alice", ["a b"])])
def test_bad_names_make_no_key(keys, name, models):
    with pytest.raises(AccessError, match="no key was made"):
        keys.create(name, models)
    assert not keys.file.exists()


def test_no_model_is_not_every_model(keys):
    keys.create("alice", [])
    assert not keys.read()[0].may_use("helpdesk")


def test_a_key_that_is_not_there_cannot_be_revoked(keys):
    keys.create("alice")
    with pytest.raises(AccessError, match="there are: alice"):
        keys.revoke("bob")
    with pytest.raises(AccessError, match=r"did you mean alice\?"):
        keys.revoke("alcie")


def test_a_key_that_was_revoked_before_is_told_with_its_day(keys, command):
    keys.create("alice")
    keys.revoke("alice")
    (revoked,) = keys.read()
    done = command("serve", "keys", "revoke", "alice")
    assert done.status == 2
    assert f"the key alice was revoked on {day(revoked.revoked_s)} already" in done.err
    write_text(keys.file, json.dumps([{"name": "bob", "sha256": "0" * 64, "created_s": 1, "revoked": True}]))
    with pytest.raises(AccessError, match="the key bob was revoked already"):  # before its day was kept
        keys.revoke("bob")


def test_two_writers_lose_nothing(keys):
    threads = [threading.Thread(target=lambda number=number: KeyFile().create(f"user{number}")) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in keys.read()} == {f"user{number}" for number in range(12)}


@pytest.mark.parametrize(
    ("host", "at_home"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("box", False)]
)
def test_loopback(host, at_home):
    assert is_loopback(host) is at_home


def test_the_command_line(home):
    run = CliRunner()
    made = run.invoke(app, ["keys", "create", "alice", "--models", "helpdesk, other", "--rpm", "60", "--tpm", "9000", "--expires", "30d"])
    secret = made.output.split()[1]
    assert made.exit_code == 0
    stored = json.loads((home / "keys.json").read_text())[0]
    assert stored["models"] == ["helpdesk", "other"]
    assert (stored["rpm"], stored["tpm"]) == (60, 9000)
    assert stored["expires_s"] - stored["created_s"] == 2_592_000
    listed = run.invoke(app, ["keys", "list"]).output
    assert "alice" in listed
    assert "9000" in listed
    assert run.invoke(app, ["keys", "create", "bob", "--rpm", "0"]).exit_code != 0
    assert secret not in listed
    assert run.invoke(app, ["keys", "revoke", "alice"]).exit_code == 0
    assert "revoked" in run.invoke(app, ["keys", "list"]).output


def test_the_operators_key_is_made_from_the_token_and_tells_nothing_of_it(home, keys):
    assert operator_key() is None, "no cluster was ever here"
    write_text(token_file(), "the cluster's token\n")
    first = operator_key()
    assert "token" not in first
    assert KeyFile(operator_secret=first).find(first).models is None
    assert KeyFile(operator_secret=first).find("the cluster's token") is None
    write_text(token_file(), "another token\n")
    assert operator_key() != first
    with pytest.raises(AccessError, match="the operator's own key"):
        keys.create("tandem")
