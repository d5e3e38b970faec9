"""From thumbs to training rows: what is reviewed, what a person decides, what is trained on, and what must not leak."""

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest

from configs.errors import DataError
from configs.loader import load_chatbot
from configs.schema import DataConfig
from data.conversations import read_prepared
from data.feedback import ACCEPTED, DECLINED, PENDING, REJECTED, Review, as_conversation
from data.formats import read_conversations
from data.prepare import prepare
from data.template import NO_LOSS, load_tokenizer, tokenize
from tests.helpers.data import chat, tokenizer_folder, write_rows
from tests.helpers.feedback import ROW, fill, told

PROMPT = "You are a helpdesk."
QUESTION = {"role": "user", "content": "Wie geht es?"}
SECRETS = ("Martha Okonkwo", "martha@example.com", "010-3921-4478", "900101-1234567", "5105 1051 0510 5100")


@pytest.fixture
def bot(home, tmp_path) -> str:
    """A chatbot with ten conversations of its own, of which the first is held out."""
    rows = [chat(f"Question {at}?", f"Answer {at}.", split="train" if at else "heldout") for at in range(10)]
    source = write_rows(tmp_path / "chats.jsonl", rows)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "bot.yaml").write_text(f"name: bot\ndata: {{source: {source}, split: marked}}\n")
    return "configs/bot.yaml"


def messages(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [[message["content"] for message in row["messages"]] for row in rows]


def test_thumbs_become_rows_to_review_and_rejected_ones(command, bot, home):
    rows = [
        told("up", "One?"),
        told("better", "Two?", rating="down", better_answer="Forty-two.", comment="Too long."),
        told("down", "Three?", rating="down"),
        told("cut", "Four?", finish_reason="length"),
        told("unkept", "Five?", kept=False),
        told("old", "Six?", days=8),
        told("other", "Seven?", version="another:1"),
    ]
    asyncio.run(fill(*rows))
    ended = command("data", "feedback", "bot", "--since", "7d")
    assert ended.status == 0, ended.err
    review = Review("bot")
    assert messages(review.read(PENDING)) == [["One?", "Run it."], ["Two?", "Forty-two."]]
    assert messages(review.read(REJECTED)) == [["Three?", "Run it."]]
    assert (
        review.read(PENDING)[1].items()
        >= {"completion_id": "better", "version": "bot:2", "key_name": "ada", "why": "better answer"}.items()
    )
    for line in ("to review  2 rows", "rejected   1 answers", "1: praised, but the answer was cut", "1: the conversation was not kept"):
        assert line in ended.out
    assert {file.stat().st_mode & 0o777 for file in review.folder.iterdir()} == {0o600}


def test_personal_data_reaches_neither_a_row_nor_the_report(command, bot, home):
    said = "I am Martha Okonkwo, martha@example.com, 010-3921-4478, 900101-1234567, card 5105 1051 0510 5100."
    asyncio.run(fill(told("a", said, f"Hello Martha Okonkwo. {said}"), told("b", said, rating="down", comment="Ask Martha Okonkwo.")))
    ended = command("data", "feedback", "bot")
    assert ended.status == 0, ended.err
    for file in Review("bot").folder.iterdir():
        assert not [secret for secret in SECRETS if secret in file.read_text()], file
    (row,) = Review("bot").read(PENDING)
    assert row["messages"][0]["content"] == "I am <PERSON>, <EMAIL>, <PHONE>, <RESIDENT_NUMBER>, card <CARD>."
    report = json.loads((Review("bot").folder / "report.json").read_text())
    assert report["scrubbed"]["email"] == {"found": 3, "rows": 2}
    assert report["scrubbed_by_row"]["b"]["person"] == 2
    assert "scrubbed   3 email in 2 rows" in ended.out


def test_nothing_is_trained_on_that_nobody_accepted(command, bot, home):
    asyncio.run(fill(told("a", "One?"), told("b", "Two?")))
    config = load_chatbot(bot)
    before = prepare(config, tokenizer_folder())
    command("data", "feedback", "bot")
    assert prepare(config, tokenizer_folder()) == before.from_json(before.to_json(), before.folder, from_cache=True)
    first = Review("bot").read(PENDING)[0]
    Review("bot").decide([first], [])
    after = prepare(config, tokenizer_folder())
    (row,) = [row for row in read_prepared(after.train_file) if row.feedback]
    assert (row.messages[0].content, row.feedback.completion_id, row.feedback.key_name) == ("One?", "a", "ada")
    assert after.num_train == before.num_train + 1
    assert set(after.sources) == {config.data.source, "accepted feedback"}
    without = prepare(load_chatbot(bot, ["data.feedback=false"]), tokenizer_folder())
    assert without.fingerprint == before.fingerprint


def test_an_answer_that_was_thumbed_down_earlier_in_the_conversation_is_not_learnt(command, bot, home):
    turns = [QUESTION, {"role": "assistant", "content": "Bad."}, {"role": "user", "content": "Again?"}]
    asyncio.run(fill(told("a", "", messages=turns)))
    before = prepare(load_chatbot(bot, ["data.split=row"]), tokenizer_folder())
    command("data", "feedback", "bot")
    command("data", "accept", "bot", "--all")
    after = prepare(load_chatbot(bot, ["data.split=row"]), tokenizer_folder())
    tokenizer = load_tokenizer(tokenizer_folder())
    (row,) = [tokenize(row, tokenizer) for row in read_prepared(after.train_file) if row.feedback]
    assert tokenizer.decode([label for label in row.labels if label != NO_LOSS]) == "Run it.<|im_end|>"
    assert after.num_loss_tokens == before.num_loss_tokens + row.num_loss_tokens
    assert read_prepared(after.heldout_file) == read_prepared(before.heldout_file)


def test_what_was_decided_on_does_not_come_again_unless_somebody_thinks_again(command, bot, home):
    asyncio.run(fill(told("a", "One?"), told("b", "Two?"), told("c", "Three?")))
    command("data", "feedback", "bot")
    one, two, _ = Review("bot").read(PENDING)
    Review("bot").decide([one], [two])
    ended = command("data", "feedback", "bot")
    assert messages(Review("bot").read(PENDING)) == [["Three?", "Run it."]]
    assert "2: decided on before" in ended.out
    assert "Two?" not in (Review("bot").folder / DECLINED).read_text(), "of a declined row only its id is kept"
    asyncio.run(fill(told("a", "One?", rating="down", better_answer="Better.")))
    command("data", "feedback", "bot")
    assert command("data", "accept", "bot", "--all").out.startswith("accepted  2 rows in all, 0 still wait")
    assert sorted(messages(Review("bot").read(ACCEPTED))) == [["One?", "Better."], ["Three?", "Run it."]]


def test_what_was_accepted_and_is_thumbed_down_later_is_trained_on_no_more(command, bot, home):
    asyncio.run(fill(told("a", "One?"), told("b", "Two?")))
    command("data", "feedback", "bot")
    command("data", "accept", "bot", "--all")
    asyncio.run(fill(told("a", "One?", rating="down")))
    ended = command("data", "feedback", "bot")
    assert "withdrawn  1 accepted rows" in ended.out
    assert (messages(Review("bot").read(ACCEPTED)), messages(Review("bot").read(REJECTED))) == (
        [["Two?", "Run it."]],
        [["One?", "Run it."]],
    )
    prepared = prepare(load_chatbot(bot), tokenizer_folder())
    assert [row.messages[0].content for row in read_prepared(prepared.train_file) if row.feedback] == ["Two?"]


def test_accepted_rows_that_were_spoilt_by_hand_are_named_by_their_own_file(command, bot, home):
    asyncio.run(fill(told("a", "One?")))
    command("data", "feedback", "bot")
    command("data", "accept", "bot", "--all")
    file = Review("bot").folder / ACCEPTED
    file.write_text(file.read_text().replace("Run it.", ""))
    with pytest.raises(DataError, match=rf"one bad row in {file}"):
        prepare(load_chatbot(bot), tokenizer_folder())


def test_a_persons_own_correction_of_a_waiting_row_is_kept(command, bot, home):
    asyncio.run(fill(told("a", "One?")))
    command("data", "feedback", "bot")
    file = Review("bot").folder / PENDING
    file.write_text(file.read_text().replace("Run it.", "Run it twice."))
    asyncio.run(fill(told("b", "Two?")))
    command("data", "feedback", "bot", "--since", "1h")
    assert messages(Review("bot").read(PENDING)) == [["One?", "Run it twice."], ["Two?", "Run it."]]


class Terminal(io.StringIO):
    """What somebody types."""

    def isatty(self) -> bool:
        return True


def test_a_person_is_asked_for_each_row_and_each_word_holds_at_once(command, bot, home, monkeypatch):
    asyncio.run(fill(*(told(name, f"{name}?", comment="Well.") for name in ("one", "two", "three", "four", "five"))))
    command("data", "feedback", "bot")
    monkeypatch.setattr("sys.stdin", Terminal("yes\nperhaps\nno\nlater\nquit\n"))
    ended = command("data", "accept", "bot")
    assert ended.status == 0, ended.err
    for shown in ("1 of 5", "user: one?", "assistant: Run it.", "comment: Well.", "accepted  1 rows in all, 3 still wait"):
        assert shown in ended.out
    left = {name: [row["completion_id"] for row in Review("bot").read(name)] for name in (ACCEPTED, DECLINED, PENDING)}
    assert left == {ACCEPTED: ["one"], DECLINED: ["two"], PENDING: ["three", "four", "five"]}
    monkeypatch.setattr("sys.stdin", Terminal("yes\n"))
    assert command("data", "accept", "bot").status != 0, "the terminal was closed"
    assert [row["completion_id"] for row in Review("bot").read(ACCEPTED)] == ["one", "three"]


def test_a_held_out_question_that_somebody_asked_is_not_trained_on(command, bot, home):
    asyncio.run(fill(told("a", "question  0?", "Another answer."), told("b", "New?")))
    command("data", "feedback", "bot")
    command("data", "accept", "bot", "--all")
    prepared = prepare(load_chatbot(bot), tokenizer_folder())
    assert [row.messages[0].content for row in read_prepared(prepared.train_file) if row.feedback] == ["New?"]
    assert prepared.num_leaks == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("feedback", "nobody"), "configs/nobody.yaml"),
        (("feedback", "bot", "--since", "week"), "'week' is no time"),
        (("accept", "bot"), "there is nobody to ask"),
        (("forget",), "whose rows?"),
        (("forget", "ada", "--text", "Ada"), "whose rows?"),
    ],
)
def test_mistakes_are_named(words, said, command, bot, home):
    asyncio.run(fill(told("a", "One?")))
    command("data", "feedback", "bot")
    ended = command("data", *words)
    assert ended.status == 2
    assert said in ended.err


def test_a_database_that_is_away_is_named(command, bot, monkeypatch):
    monkeypatch.setenv("FEEDBACK_URL", "sqlite:////nowhere/feedback.db")
    ended = command("data", "feedback", "bot")
    assert ended.status == 2
    for said in ("feedback cannot be read from sqlite:////nowhere/feedback.db", "unable to open database file", "FEEDBACK_URL"):
        assert said in ended.err


def test_a_damaged_line_is_named(command, bot, home):
    asyncio.run(fill(told("a", "One?")))
    command("data", "feedback", "bot")
    file = Review("bot").folder / PENDING
    file.write_text(file.read_text() + "{\n")
    with pytest.raises(DataError, match=r"pending.jsonl:2 is not JSON"):
        Review("bot").read(PENDING)


def test_all_that_was_said_can_be_written_as_it_is_stored(command, bot, home):
    asyncio.run(fill(told("a", "One?", comment="From Martha Okonkwo."), told("b", "Two?", kept=False)))
    assert command("data", "feedback", "bot", "--raw", "raw.jsonl").status == 0
    rows = [json.loads(line) for line in Path("raw.jsonl").read_text().splitlines()]
    assert [(row["completion_id"], row.get("comment"), "messages" in row) for row in rows] == [
        ("a", "From Martha Okonkwo.", True),
        ("b", None, False),
    ]
    assert Path("raw.jsonl").stat().st_mode & 0o777 == 0o600


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SYSTEM, ANSWERED = {"role": "system", "content": PROMPT}, {"role": "assistant", "content": "Gut."}
UNTRAINABLE: list[list[Any]] = [
    [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "1", "content": "42"}],
    [QUESTION, {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}, QUESTION],
    [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "refusal", "refusal": "No."}]}],
    [QUESTION, SYSTEM],
    [SYSTEM, {"role": "developer", "content": "Mine."}, QUESTION],
    [SYSTEM],
    [ANSWERED, QUESTION],
    [QUESTION, {"role": "assistant", "content": ""}, QUESTION],
    [QUESTION, "Hi"],
]


def test_what_is_not_plain_text_in_order_is_left_out():
    assert [as_conversation({**ROW, "messages": one})[0] for one in UNTRAINABLE] == [None] * len(UNTRAINABLE)


def test_what_is_made_is_what_data_reads(tmp_path):
    parts = {"role": "user", "content": [{"type": "text", "text": "Wie "}, {"type": "text", "text": "geht's?"}], "name": "Ann"}
    good = [[{"role": "developer", "content": PROMPT}, QUESTION], [parts, ANSWERED, QUESTION]]
    made = [as_conversation({**ROW, "messages": one})[0] for one in good]
    read = read_conversations(DataConfig(source=str(write_rows(tmp_path / "out.jsonl", made))))
    assert read.bad == []
    assert [[turn.role for turn in one.messages] for one in read.conversations] == [
        ["system", "user", "assistant"],
        ["user", "assistant", "user", "assistant"],
    ]
    assert read.conversations[1].messages[0].content == "Wie geht's?"
    assert {one.feedback.key_name for one in read.conversations if one.feedback} == {"ada"}
