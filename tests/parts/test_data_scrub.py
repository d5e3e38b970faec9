"""Personal data on planted texts: what is found, and what is taken for personal data though it is none."""

import subprocess
import sys
from collections import Counter

import pytest

from configs.loader import ROOT
from data.scrub import Scrubber
from tests.helpers.planted import CLEAN, NAMES, planted

MIN_RECALL, MIN_PRECISION = 0.95, 0.95


@pytest.fixture(scope="module")
def scrubber() -> Scrubber:
    return Scrubber()


def parts_left(text: str, value: str) -> list[str]:
    """Return what of a planted value still stands in a scrubbed text: words for names, runs of digits or letters for the rest."""
    return [part for part in value.replace("-", " ").split() if len(part) > 1 and part in text]


def test_planted_personal_data_is_found(scrubber):
    planted_items = list(planted())
    all_of, found = Counter(item.kind for item in planted_items), Counter[str]()
    for item in planted_items:
        found[item.kind] += not parts_left(scrubber.scrub(item.text).text, item.value)
    recall = {kind: found[kind] / count for kind, count in all_of.items()}
    print(f"recall {sum(found.values()) / sum(all_of.values()):.3f}", recall)
    assert sum(all_of.values()) >= 200
    assert all(share >= MIN_RECALL for share in recall.values()), recall


def test_little_else_is_taken_for_personal_data(scrubber):
    clean = {text: scrubber.scrub(text) for text in CLEAN}
    wrong = [scrubbed.text for scrubbed in clean.values() if scrubbed.counts]
    right, extra = 0, 0
    for item in planted():
        num_found = sum(scrubber.scrub(item.text).counts.values())
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
    """The lists come from Faker, the test's names do not."""
    code = (ROOT / "data" / "scrub_names.py").read_text()
    assert not [name for name in NAMES if " " in name and name in code]


def test_it_asks_nothing_of_the_network():
    """A socket that may not connect stands for a machine without one."""
    code = (
        "import socket\n"
        "def refuse(*_): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from data.scrub import Scrubber\n"
        "print(Scrubber().scrub('Write to martha@example.com, www.example.com').text)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "Write to <EMAIL>, www.example.com\n", done.stderr
