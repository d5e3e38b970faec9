"""Splits are exact, stable, and keep equal conversations together."""

import random

import pytest

from configs.errors import DataError
from configs.schema import DataConfig
from data.conversations import Conversation, Feedback, Message
from data.split import split_conversations


def ask(asked: str, answered: str = "Ho", system: str = "", **fields) -> Conversation:
    head = (Message("system", system),) if system else ()
    return Conversation((*head, Message("user", asked), Message("assistant", answered)), **fields)


def split(conversations, **settings):
    return split_conversations(conversations, DataConfig(source="x", **settings))


def asked(conversations) -> set[str]:
    return {conversation.messages[-2].content for conversation in conversations}


HUNDRED = [ask(f"question {number}", group=f"g{number // 5}") for number in range(100)]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.999])
def test_share_is_exact(share):
    result = split(HUNDRED, heldout_share=share)
    assert len(result.heldout) == min(99, round(share * 100))
    assert len(result.train) + len(result.heldout) == 100
    assert {entry.split for entry in result.train} == {"train"}
    assert {entry.split for entry in result.heldout} == {"heldout"}


def test_order_and_system_prompt_do_not_matter_but_the_seed_does():
    shuffled = [ask(entry.messages[0].content, system="new", group=entry.group) for entry in HUNDRED]
    random.Random(1).shuffle(shuffled)
    assert asked(split(HUNDRED).heldout) == asked(split(shuffled).heldout)
    assert asked(split(HUNDRED).heldout) != asked(split(HUNDRED, split_seed=1).heldout)


def test_more_rows_move_few_old_ones():
    more = [*HUNDRED, *(ask(f"new {number}") for number in range(10))]
    assert len(asked(split(HUNDRED).heldout) & asked(split(more).heldout)) >= 8


def test_groups_stay_whole():
    result = split(HUNDRED, split="group", heldout_share=0.2)
    groups = [{entry.group for entry in side} for side in (result.train, result.heldout)]
    assert not groups[0] & groups[1]
    assert len(groups[1]) == 4


def test_duplicates_are_equal_but_for_case_and_white_space():
    rows = [
        ask("How  do I?\n"),
        ask("how do i?"),
        ask("How do I", "Ho"),
        ask("How do I?", system="S"),
        ask("other"),
        ask("how do i?", "ho "),
    ]
    result = split(rows, heldout_share=0.3)
    assert result.num_duplicates == 2
    kept = split(rows, heldout_share=0.3, deduplicate=False)
    assert (kept.num_duplicates, len(kept.train) + len(kept.heldout)) == (0, 6)


@pytest.mark.parametrize("seed", range(8))
def test_equal_rows_never_stand_on_both_sides(seed):
    rows = [ask(f"q{number % 7}", system=f"s{number % 2}") for number in range(40)]
    result = split(rows, deduplicate=False, split_seed=seed, heldout_share=0.4)
    assert not asked(result.train) & asked(result.heldout)
    assert result.num_leaks == 0


def test_marked_rows_go_where_they_are_marked_and_leaks_leave_training():
    rows = [
        ask("a", split="train"),
        ask("b", split="train"),
        ask("B ", split="heldout"),
        ask("b", split="heldout"),
        ask("c", split="heldout"),
    ]
    result = split(rows, split="marked")
    assert (asked(result.train), asked(result.heldout)) == ({"a"}, {"B ", "c"})
    assert (result.num_duplicates, result.num_leaks) == (1, 1)


@pytest.mark.parametrize("by", ["row", "group"])
def test_feedback_is_trained_on_and_moves_no_other_row(by):
    told = [ask(f"said {number}", group=f"feedback {number}", feedback=Feedback(f"x{number}", "bot:2", "ada", 5.0)) for number in range(40)]
    alone, beside = split(HUNDRED, split=by), split([*HUNDRED, *told], split=by)
    assert asked(beside.heldout) == asked(alone.heldout)
    assert asked(beside.train) == asked(alone.train) | asked(told)
    with pytest.raises(DataError, match="all are feedback"):
        split(told, split=by)


def test_leaks_between_groups_leave_training():
    rows = [ask("same", group="g1"), ask("same", group="g2"), ask("x", group="g1"), ask("y", group="g2")]
    result = split(rows, split="group", deduplicate=False, heldout_share=0.5)
    assert (len(result.train), len(result.heldout), result.num_leaks) == (1, 2, 1)


def test_one_sided_splits_are_refused():
    cases = [
        ([ask("a", split="train")], "marked", "no conversation is marked as held out"),
        ([ask("a", split="heldout")], "marked", "no conversation is marked as to train on"),
        ([ask("a", split="heldout"), ask("a", split="train")], "marked", "all 1 conversations are held out too"),
        ([ask("a", group="g"), ask("b", group="g")], "group", "all are of one group"),
        ([ask("a"), ask("A")], "row", "all are equal"),
    ]
    for rows, by, pattern in cases:
        with pytest.raises(DataError, match=pattern):
            split(rows, split=by)
