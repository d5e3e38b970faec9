"""The chat page in a real headless Chromium, on a real engine."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ray.stack import Stack

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
PHONE = {"width": 360, "height": 700}
ANSWER_MS = 30_000

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def bot(stack: Stack, config) -> str:
    version = stack.train(config, "name=pagebot")
    done = stack.run("serve", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert stack.run("serve", "promote", version.name).returncode == 0
    return version.name


@pytest.fixture(scope="module")
def secret(stack: Stack, bot) -> str:
    return stack.make_key("web", "--models", "pagebot")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, stack: Stack, bot, request) -> Iterator[Any]:
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


def enter(page, secret: str) -> None:
    """Give the page its key, which it asks for when it is refused."""
    page.locator("#key-dialog[open]").wait_for()
    page.fill("#key", secret)
    page.keyboard.press("Enter")
    page.locator("#model option", has_text="pagebot").first.wait_for(state="attached")


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


def test_a_conversation_with_a_key_is_there_after_a_reload(page, secret, bot):
    enter(page, secret)
    assert page.locator("#model").input_value() in ("pagebot", bot)
    assert "smollm" not in page.locator("#model").inner_text()
    turn = answer(page, "How do I start?")
    assert turn.locator("span").inner_text().strip()
    assert turn.locator("small").inner_text() == bot
    turn = answer(page, "And <b>then</b>?")
    assert page.locator(".turn").count() == 4
    assert page.locator(".turn b").count() == 0, "what is said is text, not HTML"
    keep_screenshot(page, "light")
    said = page.locator("#talk").inner_text()
    page.reload()
    page.locator(".turn").nth(3).wait_for()
    assert page.locator("#talk").inner_text() == said
    assert secret not in page.content()
    page.click("#fresh")
    assert page.locator(".turn").count() == 0


def test_tokens_arrive_one_after_the_other_and_escape_stops_them(page, secret):
    enter(page, secret)
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
def test_it_fits_a_phone_and_the_dark(page, secret):
    enter(page, secret)
    answer(page, "How do I start? " + "x" * 200)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert page.locator("#send").is_visible()
    keep_screenshot(page, "phone-dark")
