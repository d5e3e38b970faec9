"""What an engine on another machine knows of the head's keys, and the head's end of it, on real files."""

import asyncio
import sqlite3
import time

import pytest

from cluster.activity import read_activity
from cluster.home import write_text
from cluster.session import operator_key, token_file
from configs.errors import AccessError
from serve.completion_ids import CompletionIds
from serve.desk import MAX_AGE_S, Desk, HeadKeys
from serve.keys import STORED, KeyFile

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def keys() -> HeadKeys:
    write_text(token_file(), "token", mode=0o600)
    return HeadKeys("0.0.0.0")


def test_nobody_comes_in_before_the_head_told_its_keys_or_long_after(keys):
    secret, key = "sk-tandem-1", None
    with pytest.raises(AccessError, match="the keys are not known"):
        keys.are_asked_for()
    secret = KeyFile().create("alice")
    keys.take(KeyFile().read(), time.monotonic())
    assert keys.are_asked_for()
    key = keys.find(secret)
    assert key is not None
    assert key.is_valid()
    assert keys.find(operator_key() or "") is not None, "the operator's is made from the token, which both have"
    keys.take(KeyFile().read(), time.monotonic() - MAX_AGE_S)
    for look in (keys.are_asked_for, lambda: keys.find(secret)):
        with pytest.raises(AccessError, match="has not answered"):
            look()


def test_what_is_revoked_at_the_head_is_out_with_the_next_answer(keys):
    secret, desk = KeyFile().create("alice"), Desk()

    def exchange() -> None:
        keys.take(STORED.validate_json(asyncio.run(desk.exchange("node", 7, 12.0))), time.monotonic())

    exchange()
    found = keys.find(secret)
    assert found is not None
    assert found.is_valid()
    KeyFile().revoke("alice")
    exchange()
    found = keys.find(secret)
    assert found is not None
    assert not found.is_valid()
    assert read_activity(7, "node").quiet_s >= 12


def test_an_answers_id_is_known_everywhere_and_feedback_lies_on_the_head(home):
    desk = Desk()
    ids = CompletionIds(asyncio.run(desk.completion_secret()))
    made = f"chatcmpl-{ids.make('bot:1', None, 'r-1')}"
    assert CompletionIds.of_home().version_of(made, None) == "bot:1"
    row = {"completion_id": made, "version": "bot:1", "key_name": None, "created_s": 1.0}
    asyncio.run(desk.save({**row, "rating": "up", "comment": None, "better_answer": None}))
    asyncio.run(desk.keep({**row, "messages": [], "answer": "Yes.", "finish_reason": "stop"}, 10))
    desk.store.close()
    with sqlite3.connect(home / "feedback.db") as database:
        assert database.execute("select rating from feedback").fetchall() == [("up",)]
        assert database.execute("select answer from conversations").fetchall() == [("Yes.",)]
