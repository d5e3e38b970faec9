"""A front whose engine dies: who asks is told to try again, and an answer that had begun is left as it is."""

import asyncio
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from serve.alive import Alive
from serve.observed import Observed
from tests.helpers.front import BASE, QUESTION, Answer, make_front

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


@pytest.mark.parametrize("deaths", [[True], [False, True]], ids=["it had died", "it dies meanwhile"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/health"])
def test_the_front_sees_the_refusal_that_the_client_gets(path, deaths, shelf, keys):
    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"its own"})

    async def receive() -> dict:
        return {"type": "http.request", "body": json.dumps({"model": BASE.name, "messages": [QUESTION]}).encode()}

    told, found, answer = iter(deaths), list[Observed](), Answer()
    front = make_front(Alive(app, lambda: next(told)), shelf, keys)
    front.watch.observers.append(found.append)
    asyncio.run(front({**SCOPE, "path": path, "method": "GET" if path == "/health" else "POST"}, receive, answer.send))
    assert (answer.status, answer.headers[b"retry-after"], answer.json["error"]["type"]) == (503, b"1", "service_unavailable")
    assert [(seen.status, seen.route, seen.is_whole) for seen in found] == [(503, path, True)]


def test_a_dead_engine_costs_a_key_nothing_of_its_quota(engine, shelf, keys):
    secret = keys.create("alice", rpm=1)
    scope = {**SCOPE, "headers": [(b"authorization", b"Bearer " + secret.encode())]}
    front = make_front(engine, shelf, keys)
    deaths = iter([True, True, False])
    front.doors = replace(front.doors, engine_has_died=lambda: next(deaths))

    async def ask_thrice() -> list[int]:
        statuses = []
        for _ in range(3):
            answer = engine.answer = Answer()

            async def receive() -> dict:
                return {
                    "type": "http.request",
                    "body": json.dumps({"model": BASE.name, "messages": [QUESTION]}).encode(),
                    "more_body": False,
                }

            await front(scope, receive, answer.send)
            statuses.append(answer.status)
        return statuses

    assert asyncio.run(ask_thrice()) == [503, 503, 200]


def test_a_replica_ends_with_its_engine_after_its_last_words():
    ended = subprocess.run([sys.executable, "-c", WORDS], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "last words\n")
