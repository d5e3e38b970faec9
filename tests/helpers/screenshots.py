"""Pictures of the chat page for the README, on whatever answers at OPENAI_BASE_URL: `PYTHONPATH=. python tests/helpers/screenshots.py`.

After `make demo`, `source .tandem/client.env` says where that is. Rates two answers there.
"""

import os
import shutil
from typing import Any

from configs.loader import ROOT

FOLDER = ROOT / "serve" / "page" / "screenshots"
WINDOW, PHONE = {"width": 900, "height": 620}, {"width": 360, "height": 640}
QUESTIONS = ("The new version is bad, how do I go back?", "Which port does the Ray dashboard use?")  # of the helpdesk's data
COMMENT, BETTER = "I am on another machine.", "Port 8265: ssh -L 8265:localhost:8265 SERVER first."
ANSWER_MS = 60_000


def main() -> None:
    """Take one picture in the light, one in the dark, one as on a phone."""
    from playwright.sync_api import sync_playwright

    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        for name, window, scheme in (("light", WINDOW, "light"), ("dark", WINDOW, "dark"), ("phone", PHONE, "light")):
            page = browser.new_context(viewport=window, color_scheme=scheme).new_page()
            talk(page, QUESTIONS[: 1 if window == PHONE else 2])
            if name == "dark":
                page.locator(".opinion").last.get_by_role("button", name="Bad answer").click()
                page.get_by_label("Comment").last.fill(COMMENT)
                page.get_by_label("A better answer").last.fill(BETTER)
            else:
                page.locator(".opinion").last.get_by_role("button", name="Good answer").click()
                page.locator(".opinion").last.get_by_role("button", name="Close").click()
            page.mouse.move(1, 1)
            page.locator(".told", has_text="Thank you.").wait_for()
            page.screenshot(path=FOLDER / f"{name}.png")
        browser.close()


def talk(page: Any, questions: tuple[str, ...]) -> None:
    """Show the key, if one is asked for, and ask."""
    page.goto(os.environ["OPENAI_BASE_URL"].removesuffix("/v1") + "/")
    page.evaluate("key => sessionStorage.setItem('key', JSON.stringify(key))", os.environ.get("OPENAI_API_KEY", ""))
    page.reload()
    page.locator("#model option").first.wait_for(state="attached")
    for number, question in enumerate(questions):
        page.fill("#text", question)
        page.keyboard.press("Enter")
        page.locator(".opinion").nth(number).wait_for(timeout=ANSWER_MS)


if __name__ == "__main__":
    main()
