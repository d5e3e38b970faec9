"""Names and versions of adapters: on a real registry, and on a shelf of our own."""

import asyncio
import logging
from dataclasses import replace
from typing import Any

import pytest

from cluster.registry import Version
from cluster.standing import Standing
from serve.adapters import Adapters, UnknownNameError
from tests.helpers.shelf import BASE, CONFIG, FINGERPRINT, WEIGHTS, Shelf, run, why_broken

pytestmark = pytest.mark.usefixtures("look_each_time")


def test_a_chatbot_goes_from_registered_to_live_to_rolled_back_on_a_real_registry(registry, register):
    adapters = Adapters(registry, BASE)

    async def story() -> None:
        await adapters.refresh()
        assert adapters.names() == ["smollm2-135m"]
        with pytest.raises(UnknownNameError):
            await adapters.resolve("helpdesk")
        register(system_prompt="Be brief.")
        assert await adapters.resolve("helpdesk:1") == "helpdesk:1", "found at its first request, whatever the last look saw"
        assert (adapters.fetched("helpdesk:1") / WEIGHTS).is_file()
        assert adapters.system_prompt("helpdesk:1") == "Be brief."
        assert adapters.names() == ["smollm2-135m", "helpdesk:1"]
        with pytest.raises(UnknownNameError):
            await adapters.resolve("helpdesk")
        registry.promote("helpdesk:1")
        await adapters.refresh()
        assert await adapters.resolve("helpdesk") == "helpdesk:1"
        register()
        registry.promote("helpdesk:2")
        await adapters.refresh()
        assert await adapters.resolve("helpdesk") == "helpdesk:2"
        assert adapters.system_prompt("helpdesk:2") is None
        assert await adapters.resolve("helpdesk:1") == "helpdesk:1", "a version stays what it is"
        registry.rollback("helpdesk")
        await adapters.refresh()
        assert await adapters.resolve("helpdesk") == "helpdesk:1"
        assert adapters.names() == ["smollm2-135m", "helpdesk", "helpdesk:1", "helpdesk:2"]

    run(story())


def test_versions_are_read_again_only_when_something_changed(adapter_shelf, put):
    """There may be hundreds of them, and a look is taken each second."""
    adapters = Adapters(adapter_shelf, BASE)

    async def looks() -> None:
        for _ in range(3):
            await adapters.refresh()

    run(looks())
    assert (adapter_shelf.num_asked, adapter_shelf.num_read) == (3, 1)
    put(adapter_shelf, "helpdesk:2")
    adapter_shelf.live["helpdesk"] = 2
    run(looks())
    assert (adapter_shelf.num_read, run(adapters.resolve("helpdesk"))) == (2, "helpdesk:2")


def test_a_new_version_is_found_at_its_first_request_even_just_after_a_look(adapter_shelf, put, monkeypatch):
    monkeypatch.undo()  # with the pause between two looks
    adapters = Adapters(adapter_shelf, BASE)

    async def story() -> str:
        await adapters.refresh()
        put(adapter_shelf, "helpdesk:2")
        return await adapters.resolve("helpdesk:2")

    assert run(story()) == "helpdesk:2"


def test_many_requests_for_unknown_names_do_not_each_ask_the_registry(adapter_shelf, monkeypatch):
    monkeypatch.undo()
    adapters = Adapters(adapter_shelf, BASE)

    async def story() -> list[Any]:
        return await asyncio.gather(*(adapters.resolve(f"gone:{number}") for number in range(1, 100)), return_exceptions=True)

    assert {type(error) for error in run(story())} == {UnknownNameError}
    assert adapter_shelf.num_asked < 10


def test_the_base_and_fetched_versions_are_found_without_the_registry(adapter_shelf):
    adapters = Adapters(adapter_shelf, BASE)
    assert run(adapters.resolve("helpdesk:1")) == "helpdesk:1"
    adapter_shelf.is_down, asked = True, adapter_shelf.num_asked
    assert run(adapters.resolve("helpdesk:1")) == "helpdesk:1"
    assert run(adapters.resolve("smollm2-135m")) == "smollm2-135m"
    assert adapter_shelf.num_asked == asked


def test_a_live_adapter_is_fetched_before_its_first_request(adapter_shelf):
    adapters = Adapters(adapter_shelf, BASE)
    run(adapters.refresh())
    assert adapter_shelf.downloads == ["helpdesk:1"]
    run(adapters.refresh())
    assert run(adapters.resolve("helpdesk")) == "helpdesk:1"
    assert adapter_shelf.downloads == ["helpdesk:1"]


def test_an_adapter_asked_for_many_times_at_once_is_fetched_once(adapter_shelf, put):
    put(adapter_shelf, "other:1")
    adapters = Adapters(adapter_shelf, BASE)

    async def story() -> list[str]:
        return await asyncio.gather(*(adapters.resolve("other:1") for _ in range(20)))

    assert set(run(story())) == {"other:1"}
    assert adapter_shelf.downloads.count("other:1") == 1


def test_names_stay_known_while_the_registry_is_down(adapter_shelf, put, caplog):
    put(adapter_shelf, "helpdesk:2")
    adapters = Adapters(adapter_shelf, BASE)
    run(adapters.refresh())
    adapter_shelf.is_down = True
    with caplog.at_level(logging.WARNING):
        run(adapters.refresh())
    assert "the registry does not answer" in caplog.text
    assert adapters.names() == ["smollm2-135m", "helpdesk", "helpdesk:1", "helpdesk:2"]
    assert run(adapters.resolve("helpdesk")) == "helpdesk:1"
    with pytest.raises(UnknownNameError):
        run(adapters.resolve("helpdesk:3"))
    assert why_broken(adapters, "helpdesk:2") == "its files cannot be had from the registry: connection refused"
    adapter_shelf.is_down = False
    assert run(adapters.resolve("helpdesk:2")) == "helpdesk:2", "a failed download is tried again"


def test_only_versions_of_this_base_are_listed(adapter_shelf, put):
    put(adapter_shelf, "other:1")
    adapter_shelf.live["other"], adapter_shelf.fingerprints["other"] = 1, "f" * 16
    adapters = Adapters(adapter_shelf, BASE)
    run(adapters.refresh())
    assert adapters.names() == ["smollm2-135m", "helpdesk", "helpdesk:1"]
    for name in ("other", "other:1"):
        assert why_broken(adapters, name) == f"it was made for some/base, and this engine serves smollm2-135m ({FINGERPRINT})"
    assert "other:1" not in adapter_shelf.downloads


def test_live_chatbots_of_another_base_are_no_warning_each_second(adapter_shelf, put, caplog):
    put(adapter_shelf, "other:1")
    adapter_shelf.live["other"], adapter_shelf.fingerprints["other"] = 1, "f" * 16
    adapters = Adapters(adapter_shelf, BASE)
    with caplog.at_level(logging.WARNING):
        run(adapters.refresh())
        run(adapters.refresh())
    assert [record.getMessage() for record in caplog.records if "other" in record.getMessage()] == []


def test_watching_goes_on_whatever_the_registry_does(adapter_shelf, put, monkeypatch, home):
    monkeypatch.setattr("serve.adapters.REFRESH_S", 0.001)
    adapters = Adapters(adapter_shelf, BASE)

    async def story() -> str:
        watcher = asyncio.create_task(adapters.watch())
        await asyncio.sleep(0)
        adapter_shelf.is_down = True
        while adapter_shelf.num_asked < 3:
            await asyncio.sleep(0.001)
        adapter_shelf.is_down = False
        put(adapter_shelf, "helpdesk:2")
        adapter_shelf.live["helpdesk"] = 2
        while await adapters.resolve("helpdesk:1") and "helpdesk:2" not in adapter_shelf.downloads:
            await asyncio.sleep(0.001)
        assert not watcher.done()
        watcher.cancel()
        return await adapters.resolve("helpdesk")

    assert run(asyncio.wait_for(story(), 30)) == "helpdesk:2"


def test_versions_with_foreign_tags_do_no_harm(adapter_shelf):
    """An MLflow server of others holds versions that Tandem did not make."""
    adapters = Adapters(adapter_shelf, BASE)
    own = adapter_shelf.versions

    def with_foreign(standings: dict[str, Standing] | None = None) -> list[Version]:
        return [*own(), replace(own()[0], chatbot="Their Model", tags={}, run_id="", aliases=("live",))]

    adapter_shelf.versions = with_foreign
    run(adapters.refresh())
    assert adapters.names() == ["smollm2-135m", "helpdesk", "helpdesk:1"]
    assert "another base model" in why_broken(adapters, "Their Model")


CONVERSATIONS = [f"conversation {number}" for number in range(400)]


def who_answers(adapters: Adapters) -> dict[str, str]:
    async def all_of_them() -> dict[str, str]:
        return {conversation: await adapters.resolve("helpdesk", lambda said=conversation: said) for conversation in CONVERSATIONS}

    return asyncio.run(all_of_them())


def test_a_canary_answers_its_share_of_conversations_and_each_stays_with_its_version(put):
    shelf = Shelf(live={"helpdesk": 1}, canaries={"helpdesk:2": 0.2})
    put(shelf, "helpdesk:1")
    put(shelf, "helpdesk:2")
    adapters = Adapters(shelf, BASE)
    asyncio.run(adapters.refresh())
    before = who_answers(adapters)
    assert 0.12 < list(before.values()).count("helpdesk:2") / len(before) < 0.28
    assert who_answers(adapters) == before
    shelf.canaries["helpdesk:2"] = 0.6
    asyncio.run(adapters.refresh())
    after = who_answers(adapters)
    assert 0.5 < list(after.values()).count("helpdesk:2") / len(after) < 0.7
    assert all(after[conversation] == "helpdesk:2" for conversation in CONVERSATIONS if before[conversation] == "helpdesk:2")
    shelf.canaries = {}
    asyncio.run(adapters.refresh())
    assert set(who_answers(adapters).values()) == {"helpdesk:1"}


def test_a_canary_that_cannot_be_served_leaves_everything_to_the_live_version(put):
    shelf = Shelf(live={"helpdesk": 1}, canaries={"helpdesk:2": 0.9})
    put(shelf, "helpdesk:1")
    (put(shelf, "helpdesk:2") / CONFIG).write_text("{")
    adapters = Adapters(shelf, BASE)
    asyncio.run(adapters.refresh())
    assert set(who_answers(adapters).values()) == {"helpdesk:1"}
