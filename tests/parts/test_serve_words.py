"""The word of a promotion, which is taken before the registry is read: what it changes, and what it may not."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from cluster.registry import Version
from cluster.standing import Standing, Word
from serve.adapters import LISTEN_S, Adapters
from tests.helpers.shelf import BASE, run

pytestmark = pytest.mark.usefixtures("look_each_time")


async def until(what: Callable[[], Awaitable[bool]]) -> None:
    while not await what():
        await asyncio.sleep(0.01)


def test_a_word_is_taken_while_the_registry_has_no_time_and_the_registry_has_the_last_one(adapter_shelf, put, home, monkeypatch):
    monkeypatch.setattr("serve.adapters.REFRESH_S", 0.01)
    put(adapter_shelf, "helpdesk:2")
    adapters = Adapters(adapter_shelf, BASE)

    def say(live: int, canary: int | None = None) -> None:
        aliases = {"live": live, **({"canary": canary} if canary else {})}
        Word(adapter_shelf.url).spread({"helpdesk": Standing(aliases, {f"canary_share.{canary}": "0.999"}, 0)})

    async def answers(wanted: str) -> None:
        async def is_so() -> bool:
            return await adapters.resolve("helpdesk") == wanted

        await asyncio.wait_for(until(is_so), 20)

    async def story() -> None:
        await adapters.refresh()
        await adapters.resolve("helpdesk:2")
        adapter_shelf.is_down = True
        watcher = asyncio.create_task(adapters.watch())
        await asyncio.sleep(0)
        await answers("helpdesk:1")
        say(live=2)
        await answers("helpdesk:2")
        say(live=1, canary=2)
        await answers("helpdesk:2")
        say(live=3)
        num_asked = adapter_shelf.num_asked
        while adapter_shelf.num_asked < num_asked + 30:
            await asyncio.sleep(0.01)
        assert await adapters.resolve("helpdesk") == "helpdesk:2", "a version that is not known here is not taken on word"
        adapter_shelf.is_down = False
        await answers("helpdesk:1")
        watcher.cancel()

    run(story())


def test_a_word_that_makes_no_sense_does_not_end_the_listening(adapter_shelf, put, home, caplog):
    put(adapter_shelf, "helpdesk:2")
    adapters = Adapters(adapter_shelf, BASE)

    async def story() -> None:
        await adapters.refresh()
        await adapters.resolve("helpdesk:2")
        adapter_shelf.is_down = True
        watcher = asyncio.create_task(adapters.watch())
        await asyncio.sleep(LISTEN_S)
        for tags, live in (({"canary_share.2": None}, 1), ({}, 2)):
            Word(adapter_shelf.url).spread({"helpdesk": Standing({"live": live, "canary": 2}, tags, 0)})
            await asyncio.sleep(3 * LISTEN_S)

        async def is_known() -> bool:
            return await adapters.resolve("helpdesk") == "helpdesk:2"

        await asyncio.wait_for(until(is_known), 20)
        assert "could not be taken" in caplog.text
        assert not watcher.done()
        watcher.cancel()

    run(story())


def test_a_look_that_began_before_a_word_does_not_take_it_back(adapter_shelf, put, home, monkeypatch):
    put(adapter_shelf, "helpdesk:2")
    adapters = Adapters(adapter_shelf, BASE)
    slow, asked = threading.Event(), threading.Event()
    own = adapter_shelf.versions

    def versions(standings: dict[str, Standing] | None = None) -> list[Version]:
        before = own(standings)
        if standings is not None:
            asked.set()
            assert slow.wait(30)
        return before

    async def story() -> None:
        await adapters.refresh()
        adapter_shelf.versions = versions
        put(adapter_shelf, "helpdesk:3")  # a reason to read the versions
        watcher = asyncio.create_task(adapters.watch())
        await asyncio.to_thread(asked.wait, 30)
        adapter_shelf.live["helpdesk"] = 2
        Word(adapter_shelf.url).spread({"helpdesk": Standing({"live": 2}, {}, 0)})

        async def is_known() -> bool:
            return await adapters.resolve("helpdesk") == "helpdesk:2"

        await asyncio.wait_for(until(is_known), 20)
        slow.set()
        num_read = adapter_shelf.num_read
        while adapter_shelf.num_read == num_read:
            assert await is_known()
            await asyncio.sleep(0.01)
        watcher.cancel()

    run(story())


def test_a_promotion_passes_the_word_on(registry, register, home):
    word = Word(registry.url)
    register()
    register()
    assert word.hear() is None
    registry.promote("helpdesk:1")
    assert word.hear()["helpdesk"].aliases == {"live": 1}
    registry.canary("helpdesk:2", 0.25)
    assert word.hear()["helpdesk"].canary_share(2) == 0.25
    registry.rollback("helpdesk")
    assert word.hear()["helpdesk"].aliases == {"live": 1}
    assert word.hear() is None
