"""Personal data on planted texts: what is found, and what is taken for personal data though it is none."""

import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from configs.loader import ROOT
from data.scrub import Scrubbed, Scrubber
from tests.helpers.planted import CLEAN, NAMES, Planted, planted

MIN_RECALL, MIN_PRECISION = 0.95, 0.95


def refuse(*_: Any) -> None:
    raise AssertionError("the network was asked")


@pytest.fixture(scope="module", autouse=True)
def _no_network() -> Iterator[None]:
    """Sockets that may not connect stand for a machine without a network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


@pytest.fixture(scope="module")
def scrubber() -> Scrubber:
    return Scrubber()


@pytest.fixture(scope="module")
def scrubbed_items(scrubber) -> list[tuple[Planted, Scrubbed]]:
    return [(item, scrubber.scrub(item.text)) for item in planted()]


def parts_left(text: str, value: str) -> list[str]:
    """Return what of a planted value still stands in a scrubbed text: words for names, runs of digits or letters for the rest."""
    return [part for part in value.replace("-", " ").split() if len(part) > 1 and part in text]


def test_planted_personal_data_is_found(scrubbed_items):
    all_of, found = Counter(item.kind for item, _ in scrubbed_items), Counter[str]()
    for item, scrubbed in scrubbed_items:
        found[item.kind] += not parts_left(scrubbed.text, item.value)
    recall = {kind: found[kind] / count for kind, count in all_of.items()}
    print(f"recall {sum(found.values()) / sum(all_of.values()):.3f}", recall)
    assert sum(all_of.values()) >= 200
    assert all(share >= MIN_RECALL for share in recall.values()), recall


def test_little_else_is_taken_for_personal_data(scrubber, scrubbed_items):
    clean = {text: scrubber.scrub(text) for text in CLEAN}
    wrong = [scrubbed.text for scrubbed in clean.values() if scrubbed.counts]
    right, extra = 0, 0
    for _, scrubbed in scrubbed_items:
        num_found = sum(scrubbed.counts.values())
        right += min(num_found, 1)
        extra += max(num_found - 1, 0)
    precision = right / (right + extra + len(wrong))
    print(f"precision {precision:.3f}", wrong)
    assert precision >= MIN_PRECISION, wrong


def test_each_finding_gets_the_placeholder_of_its_kind(scrubber):
    text = "Mail anna.berg@example.org or call +49 30 901820, card 4111 1111 1111 1111, number 900101-1234567, IBAN DE89370400440532013000."
    scrubbed = scrubber.scrub(text)
    assert scrubbed.text == "Mail <EMAIL> or call <PHONE>, card <CARD>, number <RESIDENT_NUMBER>, IBAN <IBAN>."
    assert scrubbed.counts == {"email": 1, "phone": 1, "card": 1, "resident_number": 1, "iban": 1}


CARDS = {
    "4111 1111 1111 1111 12/27": "<CARD> 12/27",
    "4111 1111 1111 1111 123": "<CARD> 123",
    "4111-1111-1111-1111-123": "<CARD>-123",
    "4111111111111111 04 29 737": "<CARD> 04 29 737",
    "3782 822463 10005 1234": "<CARD> 1234",
    "1234 4111 1111 1111 1111 123": "1234 <CARD> 123",
    "41111111 11111111": "<CARD>",
    "4111 1111 1111 1112 123": "4111 1111 1111 1112 123",
}


@pytest.mark.parametrize("text", CARDS)
def test_a_card_number_is_found_whatever_digits_stand_beside_it(text, scrubber):
    assert scrubber.scrub(f"Charge {text}, please").text == f"Charge {CARDS[text]}, please"


def test_a_text_without_personal_data_stays_as_it_is(scrubber):
    text = "Run `make setup`,\n\n  then  wait: 3 of 4 are done. \u00a0\U0001f600"
    assert (scrubber.scrub(text).text, scrubber.scrub(text).counts) == (text, {})
    assert scrubber.scrub("").text == ""


def test_words_to_keep_are_no_names(scrubber):
    text = "Ask Ray Serve, said Martha Okonkwo."
    assert scrubber.scrub("Who started Ray on Tuesday?").text != "Who started Ray on Tuesday?"
    keeping = Scrubber(["Ray", "Serve"])
    assert keeping.scrub("Who started Ray on Tuesday?").text == "Who started Ray on Tuesday?"
    assert keeping.scrub(text).text == "Ask Ray Serve, said <PERSON>."


def test_no_planted_name_stands_in_the_recognisers():
    """Their lists are Faker's, in which many of these names stand too, each by itself; what is ours has none of them."""
    code = (ROOT / "data" / "scrub_names.py").read_text()
    assert not [name for name in NAMES if " " in name and name in code]


def test_it_asks_nothing_of_the_network(scrubber):
    """Nor do all the other tests here; this one has an address that could be looked up."""
    assert scrubber.scrub("Write to martha@example.com, www.example.com").text == "Write to <EMAIL>, www.example.com"
    with pytest.raises(AssertionError, match="network"):
        socket.create_connection(("127.0.0.1", 9))
