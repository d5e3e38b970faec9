"""Who may ask what: keys before the front."""

import time
from typing import Any

import pytest

from serve.keys import LOOK_EVERY_S, KeyFile
from tests.helpers.front import ASKED, BASE, OPERATOR_SECRET, Answer, chat


def show(secret: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + secret.encode())]


def keyed(ask, secret: str | None, **changes: Any) -> Answer:
    return ask("POST", "/v1/chat/completions", {**ASKED, **changes}, show(secret) if secret else ())


def test_as_soon_as_there_is_a_key_every_request_shows_one(ask, keys, engine):
    assert chat(ask).status == 200
    secret = keys.create("alice")
    for headers in (
        (),
        show("sk-tandem-wrong"),
        [(b"authorization", b"Basic " + secret.encode())],
        [(b"authorization", b"Bearer ")],
        show(secret[:-1]),
    ):
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/nothing")):
            answer = ask(method, path, ASKED, headers)
            assert answer.status == 401
            assert answer.json["error"]["code"] == "invalid_api_key"
    assert len(engine.bodies) == 1, "nothing refused reaches the engine"
    assert keyed(ask, secret).status == 200
    assert b"authorization" not in engine.headers, "the engine sees no key"


def test_health_needs_no_key(ask, keys):
    keys.create("alice")
    assert ask("GET", "/health").status == 200


def test_a_revoked_or_expired_key_is_out_in_a_moment_and_the_door_stays_shut(ask, keys):
    secret, short = keys.create("alice"), keys.create("bob", lifetime_s=-1)
    assert "expired" in keyed(ask, short).json["error"]["message"]
    KeyFile(keys.file).revoke("alice")  # as another process does it
    time.sleep(LOOK_EVERY_S)
    assert "revoked" in keyed(ask, secret).json["error"]["message"]
    assert keyed(ask, None).status == 401, "no valid key is left, and still none may ask without"


def test_a_key_opens_its_models_and_knows_of_no_others(ask, keys):
    secret = keys.create("alice", ["helpdesk"])
    listed = ask("GET", "/v1/models", b"", show(secret)).json["data"]
    assert [card["id"] for card in listed] == ["helpdesk", "helpdesk:1", "helpdesk:2"]
    assert keyed(ask, secret, model="helpdesk").status == keyed(ask, secret, model="helpdesk:1").status == 200
    other, nothing = (keyed(ask, secret, model=name).json["error"]["message"] for name in ("other:1", "nothing:1"))
    assert other.replace("other", "nothing") == nothing
    assert BASE.name not in nothing
    assert keyed(ask, secret, model=BASE.name).status == 404, "the base is not among its models"
    assert BASE.name not in keyed(ask, secret, model=None).json["error"]["message"]


def test_a_key_for_one_version_opens_that_version_alone(ask, keys):
    secret = keys.create("alice", ["helpdesk:1"])
    assert keyed(ask, secret, model="helpdesk:1").status == 200
    assert keyed(ask, secret, model="helpdesk").status == keyed(ask, secret, model="helpdesk:2").status == 404


@pytest.mark.parametrize("harm", ["garbled", "gone"])
def test_keys_that_cannot_be_read_shut_the_door(ask, keys, harm):
    secret = keys.create("alice")
    assert keyed(ask, secret).status == 200
    keys.file.unlink() if harm == "gone" else keys.file.write_text("[{}]")
    time.sleep(LOOK_EVERY_S)
    assert keyed(ask, secret).status == keyed(ask, None).status == 503


def test_where_others_can_reach_the_address_no_key_means_no_entry(ask, keys):
    keys.host = "0.0.0.0"
    assert keyed(ask, None).status == 401


def test_the_operators_key_is_built_in_and_may_use_everything(ask, keys):
    assert keyed(ask, OPERATOR_SECRET).status == 200, "nobody needs a key yet"
    secret = keys.create("alice", ["other"])
    for name in ("helpdesk", "other:1", BASE.name):
        assert keyed(ask, OPERATOR_SECRET, model=name).status == 200
    assert keyed(ask, OPERATOR_SECRET[:-1]).status == 401
    assert keyed(ask, secret).status == 404
    assert OPERATOR_SECRET not in keys.file.read_text()
