"""The review of feedback: what is decided holds, is withdrawn when somebody thinks again, and no hand or neighbour can spoil it."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from configs.errors import DataError
from data.feedback import ACCEPTED, DECLINED, PENDING, REJECTED, Review, review_lock
from data.forget import by_key, by_text, is_wanted
from data.scrub import Scrubber
from tests.helpers.data import chat
from tests.helpers.feedback import ROW

ABOUT = {"version": "bot:2", "key_name": "ada", "group": "feedback", "split": "train", "why": "praised", "comment": None, "scrubbed": {}}


def row(completion_id: str, created_s: float = 5.0, **changes: Any) -> dict[str, Any]:
    return {**chat("Hi", "Ho"), **ABOUT, "completion_id": completion_id, "created_s": created_s, **changes}


def opinion(completion_id: str, created_s: float = 5.0, **said: Any) -> dict[str, Any]:
    """An opinion whose conversation was not kept, so that nothing is to be scrubbed."""
    return {**ROW, "completion_id": completion_id, "created_s": created_s, "messages": None, "answer": None, **said}


def ids(review: Review) -> dict[str, list[str]]:
    return {name: [one["completion_id"] for one in review.read(name)] for name in (PENDING, ACCEPTED, DECLINED, REJECTED)}


@pytest.fixture
def review(home) -> Review:
    """One row that waits, one accepted, one rejected."""
    made = Review("bot")
    for name, completion_id in ((PENDING, "p"), (ACCEPTED, "a"), (REJECTED, "r")):
        made.write(name, [row(completion_id)])
    return made


def gather(review: Review, *opinions: dict[str, Any], since_s: float = 0.0):
    return review.gather(lambda: list(opinions), since_s, Scrubber)


def test_what_was_accepted_is_withdrawn_when_somebody_thinks_again(review):
    assert gather(review, opinion("p"), opinion("a"), opinion("r")).num_withdrawn == 0
    assert ids(review)[ACCEPTED] == ["a"]
    gathered = gather(review, opinion("p"), opinion("a", 6.0, rating="down"), opinion("r"), since_s=100.0)
    assert (gathered.num_withdrawn, ids(review)[ACCEPTED]) == (1, []), "however far back one looks"


def test_declining_the_renewed_row_takes_the_accepted_one_out(review):
    renewed = row("a", 6.0)
    review.write(PENDING, [renewed])
    review.decide([], [renewed])
    assert ids(review) == {PENDING: [], ACCEPTED: [], DECLINED: ["a"], REJECTED: ["r"]}


def test_a_row_that_a_broken_run_left_accepted_and_waiting_waits_no_more(review):
    review.write(PENDING, [row("p"), row("a")])
    gather(review, opinion("p"), opinion("a"))
    assert (ids(review)[PENDING], ids(review)[ACCEPTED]) == (["p"], ["a"])


def test_a_shorter_look_keeps_the_rejected_rows(review):
    assert [one["completion_id"] for one in gather(review, opinion("r", rating="down"), since_s=100.0).rejected] == ["r"]
    assert ids(review)[REJECTED] == ["r"]
    gather(review, opinion("r", 6.0), since_s=100.0)
    assert ids(review)[REJECTED] == [], "it was rated anew"


def test_a_row_that_waits_no_more_is_not_brought_back(review):
    """As when it was forgotten while somebody looked at it."""
    shown = review.read(PENDING)
    review.write(PENDING, [])
    review.decide(shown, [])
    assert ids(review)[ACCEPTED] == ["a"]


def _accept(completion_id: str) -> None:
    review = Review("bot")
    review.decide([one for one in review.read(PENDING) if one["completion_id"] == completion_id], [])


def test_many_decide_at_once_and_none_is_lost(review):
    names = [f"p{number}" for number in range(8)]
    review.write(PENDING, [row(name) for name in names])
    with multiprocessing.get_context("fork").Pool(4) as pool:
        with review_lock():
            asked = pool.map_async(_accept, names)
            asked.wait(0.5)
            assert not asked.ready(), "they wait for whoever is at work"
            assert ids(review)[ACCEPTED] == ["a"]
        asked.get(30)
    assert sorted(ids(review)[ACCEPTED]) == ["a", *names]
    assert ids(review)[PENDING] == []


SPOILT = {
    "[]": "pending.jsonl:2 is no object with fields",
    "7": "pending.jsonl:2 is no object with fields",
    "[" * 100_000: "pending.jsonl:2 is not JSON",
    json.dumps({name: value for name, value in row("x").items() if name != "created_s"}): "pending.jsonl:2 has a wrong created_s",
    json.dumps({**row("x"), "completion_id": ["x"]}): "pending.jsonl:2 has a wrong completion_id",
    json.dumps(row("x", scrubbed={"person": "two"})): "pending.jsonl:2 has a wrong scrubbed.person",
    json.dumps(row("x", **chat("Hi", " "))): r"pending.jsonl:2 message 2 \(assistant\) has empty content",
    json.dumps(row("x", messages=["Hi"])): "pending.jsonl:2 has messages that are no list of objects",
}


@pytest.mark.parametrize("line", SPOILT, ids=[said.partition(" ")[2] for said in SPOILT.values()])
def test_what_somebodys_hand_spoilt_is_named_with_its_line(line, review, command):
    file = review.folder / PENDING
    file.write_text(f"{json.dumps(row('p'))}\n{line}\n")
    with pytest.raises(DataError, match=SPOILT[line]):
        gather(review)
    (Path("configs")).mkdir()
    Path("configs/bot.yaml").write_text("name: bot\ndata: {source: x.jsonl}\n")
    ended = command("data", "accept", "bot", "--all")
    assert (ended.status, "pending.jsonl:2" in ended.err) == (2, True)
    assert [one["completion_id"] for one in review.read(ACCEPTED)] == ["a"], "all or nothing"


SIGNED = "Where is it?\nRegards,\nAlice Smith"


@pytest.mark.parametrize(
    "held",
    [
        {"messages": [{"role": "user", "content": SIGNED}]},
        {"messages": [{"role": "user", "content": "Name\tALICE SMITH\tOslo"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Ask Alice\nSmith."}]}]},
        {"Alice Smith": 1},
        {"place": "a.jsonl:1", "raw": json.dumps({"question": SIGNED})},
        {"place": "a.jsonl:1", "raw": json.dumps({"question": SIGNED})[:-1]},
        {"place": "a.jsonl:1", "raw": json.dumps([SIGNED])},
    ],
)
def test_a_name_is_found_wherever_it_stands_in_a_row(held):
    assert is_wanted(held, set(), by_text("alice smith"))
    assert not is_wanted(held, set(), by_text("lice smith"))
    assert not is_wanted(held, set(), by_text("Alice Smit"))


def test_a_name_is_found_in_any_unicode_spelling():
    composed, taken_apart = "Zo\u00eb Quill", "Zoe\u0308 Quill"
    for written, asked in ((composed, taken_apart), (taken_apart, composed)):
        assert by_text(asked)({"messages": [{"content": f"I am {written}."}]})
    assert is_wanted({"raw": '{"question": "I am Zo\\u00eb Quill."'}, set(), by_text(taken_apart)), "in a line that is not JSON too"


def test_a_number_is_found_as_a_number_and_as_a_text():
    assert by_text("1039214478")({"phone": 1039214478})
    assert by_text("1039214478")({"phone": "1039214478"})


def test_a_key_is_looked_for_where_it_stands_alone():
    assert by_key("ada")({"feedback": {"key_name": "ada"}})
    assert not by_key("ada")({"feedback": "ada", "messages": "ada"}), "a row of somebody else's shape"
