"""The chat page in a real headless Chromium, on a real engine."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.feedback_store import read_feedback
from tests.ray.stack import Stack

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
PHONE = {"width": 360, "height": 700}
ANSWER_MS = 30_000

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def page_key(stack: Stack) -> str:
    return stack.make_key("web", "--models", "guide")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, stack: Stack, live_guide, request) -> Iterator[Any]:
    """A page in a tab of its own, whose errors and whose requests to anyone else fail the test."""
    home = stack.endpoint.removesuffix("/v1")
    tab = browser.new_context(**getattr(request, "param", {}))
    page = tab.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda sent: errors.append(sent.url) if not sent.url.startswith((home, "data:")) else None)
    page.goto(home + "/")
    yield page
    tab.close()
    assert errors == []


def enter(page, page_key: str) -> None:
    """Give the page its key, which it asks for when it is refused."""
    page.locator("#key-dialog[open]").wait_for()
    page.fill("#key", page_key)
    page.keyboard.press("Enter")
    page.locator("#model option", has_text="guide").first.wait_for(state="attached")


def answer(page, question: str) -> Any:
    page.fill("#text", question)
    page.keyboard.press("Enter")
    turn = page.locator(".turn.assistant").last
    page.locator("#stop").wait_for(state="hidden", timeout=ANSWER_MS)
    return turn


def keep_screenshot(page, name: str) -> None:
    """Keep a picture to look at, where one was asked for."""
    if folder := os.environ.get("TANDEM_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_a_conversation_with_a_key_is_there_after_a_reload(page, page_key, live_guide, tiny_model):
    enter(page, page_key)
    assert page.locator("#model").input_value() in ("guide", live_guide)
    assert tiny_model.name not in page.locator("#model").inner_text(), "the key does not open the base"
    turn = answer(page, "How do I start?")
    assert turn.locator("span").inner_text().strip()
    assert turn.locator("small").inner_text() == live_guide
    turn = answer(page, "And <b>then</b>?")
    assert page.locator(".turn").count() == 4
    assert page.locator(".turn b").count() == 0, "what is said is text, not HTML"
    said = page.locator("#talk").inner_text()
    page.reload()
    page.locator(".turn").nth(3).wait_for()
    assert page.locator("#talk").inner_text() == said
    assert page_key not in page.content()
    page.click("#fresh")
    assert page.locator(".turn").count() == 0


def thumbs(page) -> tuple[Any, Any, Any]:
    """The thumbs of the last answer, up and down."""
    opinion = page.locator(".opinion").last
    return opinion, opinion.get_by_role("button", name="Good answer"), opinion.get_by_role("button", name="Bad answer")


def test_thumbs_and_words_are_stored_and_there_after_a_reload(page, page_key, live_guide, stack: Stack):
    """By keyboard; a changed mind takes the place of the first."""
    enter(page, page_key)
    page.get_by_role("note").filter(has_text="Conversations here are stored").wait_for()
    answer(page, "How do I start?")
    said = answer(page, "And then?").locator("span").text_content()
    opinion, good, bad = thumbs(page)
    good.focus()
    page.keyboard.press("Enter")
    opinion.get_by_text("Thank you.").wait_for()
    assert good.get_attribute("aria-pressed") == "true"
    assert not opinion.get_by_label("A better answer").is_visible()
    keep_screenshot(page, "light")
    bad.click()
    opinion.get_by_label("Comment").fill("Not that one.")
    opinion.get_by_label("A better answer").fill("Read the <b>README</b>.")
    opinion.get_by_role("button", name="Send feedback").click()
    opinion.get_by_text("Thank you, that helps.").wait_for()
    keep_screenshot(page, "thumb")
    page.reload()
    opinion, good, bad = thumbs(page)
    assert (good.get_attribute("aria-pressed"), bad.get_attribute("aria-pressed")) == ("false", "true")
    bad.click()
    assert opinion.get_by_label("A better answer").input_value() == "Read the <b>README</b>."
    (row,) = (row for row in read_feedback(f"sqlite:///{stack.home}/feedback.db") if row["key_name"] == "web")
    told = {
        "version": live_guide,
        "key_name": "web",
        "rating": "down",
        "comment": "Not that one.",
        "better_answer": "Read the <b>README</b>.",
    }
    assert row.items() >= told.items()
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant", "user"]
    assert row["answer"] == said


def test_a_thumb_that_cannot_be_sent_says_why_and_is_not_pressed(page, page_key):
    enter(page, page_key)
    answer(page, "How do I start?")
    page.evaluate("sessionStorage.setItem('key', JSON.stringify('sk-tandem-wrong'))")
    opinion, good, _ = thumbs(page)
    good.click()
    opinion.get_by_text("This could not be sent: the key is unknown").wait_for()
    assert good.get_attribute("aria-pressed") == "false"
    page.locator("#key-dialog[open]").wait_for()


def test_tokens_arrive_one_after_the_other_and_escape_stops_them(page, page_key):
    enter(page, page_key)
    page.evaluate("""() => {
        window.seen = new Set();
        new MutationObserver(() => {
            const last = document.querySelector('.turn.assistant:last-of-type span');
            if (last) { window.seen.add(last.textContent); if (window.seen.size === 4) dispatch(); }
        }).observe(document.getElementById('talk'), {subtree: true, childList: true, characterData: true});
        const dispatch = () => document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}));
    }""")
    turn = answer(page, "Tell me a long story.")
    assert page.evaluate("window.seen.size") >= 4
    assert turn.locator("small").inner_text().endswith("· stopped")
    assert page.evaluate("document.activeElement.id") == "text"


def test_a_wrong_key_is_told_and_asked_for_again(page):
    page.locator("#key-dialog[open]").wait_for()
    page.fill("#key", "sk-tandem-wrong")
    page.keyboard.press("Enter")
    page.locator(".turn.bad", has_text="the key is unknown").wait_for()
    page.locator("#key-dialog[open]").wait_for()


@pytest.mark.parametrize("page", [{"viewport": PHONE, "color_scheme": "dark"}], indirect=True)
def test_it_fits_a_phone_and_the_dark(page, page_key):
    enter(page, page_key)
    answer(page, "How do I start? " + "x" * 200)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert page.locator("#send").is_visible()
    page.get_by_role("button", name="Bad answer").click()
    page.get_by_label("A better answer").fill("A shorter one.")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    keep_screenshot(page, "phone-dark")
