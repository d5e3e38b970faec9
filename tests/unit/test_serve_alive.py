"""A front whose engine dies: who asks is told to try again, and an answer that had begun is left as it is."""

import asyncio
import subprocess
import sys

import pytest

from serve.alive import Alive

SCOPE = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
WORDS = """
import asyncio
from serve.alive import leave_with
asyncio.run(leave_with(lambda: True, lambda: print("last words", flush=True)))
"""


def ask(answers: list[int], deaths: list[bool]) -> list[int]:
    """Ask an application that answers so; the engine says in turn whether it has died. Return what statuses were sent."""
    sent = []

    async def app(scope, receive, send) -> None:
        for status in answers:
            await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"its own"})

    async def send(message) -> None:
        sent.append(message)

    told = iter(deaths)
    asyncio.run(Alive(app, lambda: next(told))(SCOPE, None, send))
    assert sent[-1]["body"] == b"its own" or b"try again" in sent[-1]["body"]
    assert len(sent) == 2, "one answer, and one alone"
    return [message["status"] for message in sent[:1]]


@pytest.mark.parametrize(
    ("answers", "deaths", "status"),
    [
        ([200], [False], 200),
        ([200], [True], 503),
        ([500], [False, True], 503),
        ([500], [False, False], 500),
        ([400], [False], 400),
    ],
    ids=["it lives", "it had died", "it dies meanwhile", "it lives and something else failed", "it lives and refuses"],
)
def test_a_dead_engine_is_503(answers, deaths, status):
    assert ask(answers, deaths) == [status]


def test_a_replica_ends_with_its_engine_after_its_last_words():
    ended = subprocess.run([sys.executable, "-c", WORDS], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "last words\n")
