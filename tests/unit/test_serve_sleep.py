"""An engine's sleep, with a card and an engine that only say what is done to them."""

import asyncio
import os

import pytest

from cluster.activity import ActivityFile, read_activity, tell_to_sleep
from serve import sleep
from serve.refusal import RefusedError
from serve.sleep import Sleeper


class Told:
    """The card and the engine: what is done to them, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.is_free = asyncio.Event()
        self.is_free.set()
        self.is_broken = self.errored = False

    async def take(self) -> None:
        await self.is_free.wait()
        self.said.append("take")

    async def release(self) -> None:
        self.said.append("release")

    async def sleep(self, level: int) -> None:
        self.said.append(f"sleep {level}")

    async def wake_up(self) -> None:
        if self.is_broken:
            raise RuntimeError("no memory")
        self.said.append("wake")


@pytest.fixture
def told(home, monkeypatch) -> Told:
    monkeypatch.setattr(sleep, "LOOK_EVERY_S", 0.01)
    return Told()


def state() -> str:
    return read_activity(os.getpid()).state


async def begun(told: Told) -> Sleeper:
    """An engine that has its card, and looks whether it is told to sleep."""
    sleeper = Sleeper(told, ActivityFile())
    await sleeper.take_card()
    sleeper.engine = told
    sleeper.watcher = asyncio.create_task(sleeper.watch())
    return sleeper


async def fall_asleep(sleeper: Sleeper) -> None:
    assert tell_to_sleep(os.getpid())
    while state() != "asleep":
        await asyncio.sleep(0.005)


def test_it_gives_its_card_back_only_after_its_memory_and_wakes_for_all_who_wait_at_once(told):
    async def story() -> None:
        sleeper = await begun(told)
        await fall_asleep(sleeper)
        assert told.said == ["take", "sleep 1", "release"]
        told.is_free.clear()

        async def ask() -> None:
            async with sleeper.awake():
                assert state() == "awake"

        asking = [asyncio.create_task(ask()) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert state() == "waiting", "the card is lent; the arbiter hears of it"
        asking[0].cancel()
        await asyncio.sleep(0.05)
        told.is_free.set()
        await asyncio.gather(*asking[1:])
        assert told.said[3:] == ["take", "wake"], "the first of them went away, and the engine wakes for the others"

    asyncio.run(story())


def test_it_does_not_sleep_under_a_request_and_forgets_that_it_was_told(told):
    async def story() -> None:
        sleeper = await begun(told)
        async with sleeper.awake():
            tell_to_sleep(os.getpid())
            await asyncio.sleep(0.1)
            assert state() == "awake"
        await asyncio.sleep(0.1)
        assert told.said == ["take"]

    asyncio.run(story())


def test_a_request_that_comes_while_it_falls_asleep_wakes_it(told):
    async def story() -> None:
        sleeper = await begun(told)
        falls = asyncio.Event()
        slowly = told.sleep

        async def sleep_slowly(level: int) -> None:
            falls.set()
            await asyncio.sleep(0.05)
            await slowly(level)

        told.sleep = sleep_slowly
        tell_to_sleep(os.getpid())
        await falls.wait()
        async with sleeper.awake():
            assert told.said == ["take", "sleep 1", "release", "take", "wake"]

    asyncio.run(story())


def test_one_that_does_not_wake_has_failed_and_refuses_all_who_wait(told):
    async def story() -> None:
        sleeper = await begun(told)
        await fall_asleep(sleeper)
        told.is_broken = True
        for _ in range(2):
            with pytest.raises(RefusedError) as refused:
                async with sleeper.awake():
                    pass
            assert refused.value.status == 503
        assert sleeper.has_failed

    asyncio.run(story())


def test_who_waits_for_an_engine_that_died_in_its_sleep_is_told(told):
    """A dead engine is called in vain, and its process ends soon after."""

    async def story() -> None:
        sleeper = await begun(told)
        await fall_asleep(sleeper)
        told.wake_up = asyncio.Event().wait

        async def ask() -> int:
            with pytest.raises(RefusedError) as refused:
                async with sleeper.awake():
                    pass
            return refused.value.status

        asking = [asyncio.create_task(ask()) for _ in range(2)]
        await asyncio.sleep(0.05)
        told.errored = True
        assert await asyncio.wait_for(asyncio.gather(*asking), 5) == [503, 503]

    asyncio.run(story())


def test_one_that_does_not_fall_asleep_has_failed_and_takes_no_second_card(told):
    async def story() -> None:
        sleeper = await begun(told)

        async def fail(level: int) -> None:
            await asyncio.sleep(0.05)
            raise RuntimeError("no memory")

        told.sleep = fail
        tell_to_sleep(os.getpid())
        while not sleeper.sleeps:
            await asyncio.sleep(0.005)
        with pytest.raises(RefusedError):
            async with sleeper.awake():
                pass
        assert (sleeper.has_failed, told.said) == (True, ["take"])

    asyncio.run(story())


def test_a_machine_without_a_gpu_tells_of_no_gpu_memory():
    assert sleep.gpu_free_bytes() == 0
