"""Requests on their way to the engine: a few at a time, in the order in which they came, and nobody waits for one that takes long."""

import asyncio
import json
from typing import Any

import pytest

from serve import intake
from serve.intake import NUM_AT_ONCE, Intake, reached
from tests.helpers.front import ASKED, BASE, Answer, make_front

pytestmark = pytest.mark.anyio


class Way:
    """Requests that note how far they are."""

    def __init__(self, num_at_once: int = 2) -> None:
        self.intake = Intake(num_at_once)
        self.begun: list[int] = []
        self.may_go: dict[int, asyncio.Event] = {}

    async def request(self, number: int, is_reached: bool = True) -> None:
        may_go = self.may_go[number] = asyncio.Event()
        async with self.intake.turn():
            self.begun.append(number)
            await may_go.wait()
            if is_reached:
                # In a task of its own, as vLLM reads its engine.
                await asyncio.create_task(self._streamed())

    async def _streamed(self) -> None:
        reached()
        await asyncio.Event().wait()

    async def begin(self, *numbers: int, **how: bool) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(self.request(number, **how)) for number in numbers]
        await turns()
        return tasks

    async def go(self, number: int) -> None:
        self.may_go[number].set()
        await turns()


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(intake, "HELD_AT_MOST_S", 60.0)


async def test_the_next_comes_as_soon_as_the_engine_has_one_and_not_when_its_answer_ends():
    way = Way()
    tasks = await way.begin(1, 2, 3, 4)
    assert way.begun == [1, 2]
    await way.go(2)
    assert way.begun == [1, 2, 3]
    await way.go(1)
    assert way.begun == [1, 2, 3, 4]
    assert not any(task.done() for task in tasks)


async def test_one_that_the_engine_never_gets_makes_room_as_it_ends():
    way = Way(num_at_once=1)
    refused, *_ = await way.begin(1, 2, is_reached=False)
    await way.go(1)
    assert refused.done()
    assert way.begun == [1, 2]


async def test_who_goes_away_while_waiting_or_on_the_way_takes_no_turn_along():
    way = Way(num_at_once=1)
    first, second, _ = await way.begin(1, 2, 3)
    second.cancel()
    first.cancel()
    await turns()
    assert way.begun == [1, 3]


async def test_one_that_takes_long_keeps_nobody_waiting_and_makes_room_only_once(monkeypatch):
    monkeypatch.setattr(intake, "HELD_AT_MOST_S", 0.0)
    way = Way(num_at_once=1)
    await way.begin(1)
    await asyncio.sleep(0.01)
    monkeypatch.setattr(intake, "HELD_AT_MOST_S", 60.0)
    await way.begin(2, 3)
    assert way.begun == [1, 2]
    await way.go(1)
    assert way.begun == [1, 2], "its turn was given away before"
    await way.go(2)
    assert way.begun == [1, 2, 3]


async def test_what_had_no_turn_has_none_to_give():
    reached()


class Crowd:
    """Requests before a front, whose engine tells that it has one when it may."""

    def __init__(self, shelf, keys) -> None:
        self.arrived, self.may_go = 0, asyncio.Event()
        self.front = make_front(self.engine, shelf, keys)
        self.requests: list[asyncio.Task[None]] = []

    async def engine(self, scope, receive, send) -> None:
        self.arrived += 1
        await self.may_go.wait()
        reached()
        await asyncio.Event().wait()

    def ask(self, num_requests: int, model: str = BASE.name, more_body: bool = False) -> None:
        body = json.dumps({**ASKED, "model": model}).encode()
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        for _ in range(num_requests):
            parts = iter([{"type": "http.request", "body": body, "more_body": more_body}])

            async def receive(parts=parts) -> dict[str, Any]:
                return next(parts, None) or await asyncio.Event().wait()

            self.requests.append(asyncio.create_task(self.front(scope, receive, Answer().send)))

    async def leave(self) -> None:
        for request in self.requests:
            request.cancel()
        await asyncio.wait(self.requests)
        self.front.feedback.store.close()


async def test_before_an_engine_a_few_are_on_the_way_and_the_next_when_it_has_them(shelf, keys):
    crowd = Crowd(shelf, keys)
    await crowd.front.adapters.refresh()
    crowd.ask(NUM_AT_ONCE + 2)
    await turns()
    assert crowd.arrived == NUM_AT_ONCE
    crowd.may_go.set()
    await turns()
    assert crowd.arrived == NUM_AT_ONCE + 2
    await crowd.leave()


async def test_who_waits_for_a_body_or_for_the_registry_has_no_turn_yet(shelf, keys, monkeypatch):
    crowd = Crowd(shelf, keys)
    await crowd.front.adapters.refresh()
    resolve = crowd.front.adapters.resolve

    async def slowly(name: str, *others: Any) -> str:
        return await (resolve(name, *others) if name == BASE.name else asyncio.Event().wait())

    monkeypatch.setattr(crowd.front.adapters, "resolve", slowly)
    crowd.ask(NUM_AT_ONCE, more_body=True)
    crowd.ask(NUM_AT_ONCE, model="helpdesk:999")
    crowd.ask(1)
    await turns()
    assert crowd.arrived == 1
    await crowd.leave()


async def test_whoever_is_over_the_bound_hears_it_and_waits_for_no_turn(shelf, keys):
    crowd = Crowd(shelf, keys)
    await crowd.front.adapters.refresh()
    bound = crowd.front.config.max_num_seqs + crowd.front.config.max_waiting_requests
    crowd.ask(bound + 1)
    await turns()
    assert crowd.arrived == NUM_AT_ONCE
    assert [request.done() for request in crowd.requests] == [False] * bound + [True]
    await crowd.leave()
