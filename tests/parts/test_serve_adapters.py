"""Names, versions and files of adapters: on a real registry, and on a shelf of our own where files are to be broken."""

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.registry import Version
from cluster.standing import Standing, Word
from serve.adapters import LISTEN_S, Adapters, Base, BrokenAdapterError, UnknownNameError, check_adapter
from tests.helpers.front import standings_of

FINGERPRINT = "0123456789abcdef"
BASE = Base("smollm2-135m", FINGERPRINT, max_lora_rank=16)
WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"


@dataclass
class Shelf:
    """Stands where the registry stands, so that it can be down, and its files broken."""

    folders: dict[str, Path] = field(default_factory=dict)
    live: dict[str, int] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    canaries: dict[str, float] = field(default_factory=dict)
    is_down: bool = False
    num_asked: int = 0
    num_read: int = 0
    downloads: list[str] = field(default_factory=list)
    url: str = "a shelf"

    def standings(self) -> dict[str, Standing]:
        self.num_asked += 1
        if self.is_down:
            raise ConnectionError("connection refused")
        return standings_of(self.versions())

    def versions(self, standings: dict[str, Standing] | None = None) -> list[Version]:
        self.num_read += standings is not None
        found = []
        for name in self.folders:
            chatbot, _, number = name.partition(":")
            tags = {"base_fingerprint": self.fingerprints.get(chatbot, FINGERPRINT), "base_model": "some/base"}
            aliases = ("live",) if self.live.get(chatbot) == int(number) else ("canary",) if name in self.canaries else ()
            found.append(Version(chatbot, int(number), "r" * 32, tags, aliases, self.canaries.get(name, 0.0)))
        return found

    def download(self, version: Version) -> Path:
        self.downloads.append(version.name)
        if self.is_down:
            raise ConnectionError("connection refused")
        return self.folders[version.name]


@pytest.fixture(autouse=True)
def look_each_time(monkeypatch):
    """Without a pause between two looks at the registry."""
    monkeypatch.setattr("serve.adapters.MIN_REFRESH_S", 0.0)


@pytest.fixture
def put(tmp_path, write_adapter):
    """Put a good adapter on a shelf."""

    def put_one(shelf: Shelf, name: str, **settings: Any) -> Path:
        shelf.folders[name] = write_adapter(tmp_path / name.replace(":", "-"), **settings)
        return shelf.folders[name]

    return put_one


@pytest.fixture
def shelf(put) -> Shelf:
    made = Shelf(live={"helpdesk": 1})
    put(made, "helpdesk:1")
    return made


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def why_broken(adapters: Adapters, name: str) -> str:
    with pytest.raises(BrokenAdapterError) as refused:
        run(adapters.resolve(name))
    return str(refused.value)


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


def test_versions_are_read_again_only_when_something_changed(shelf, put):
    """There may be hundreds of them, and a look is taken each second."""
    adapters = Adapters(shelf, BASE)

    async def looks() -> None:
        for _ in range(3):
            await adapters.refresh()

    run(looks())
    assert (shelf.num_asked, shelf.num_read) == (3, 1)
    put(shelf, "helpdesk:2")
    shelf.live["helpdesk"] = 2
    run(looks())
    assert (shelf.num_read, run(adapters.resolve("helpdesk"))) == (2, "helpdesk:2")


def test_a_new_version_is_found_at_its_first_request_even_just_after_a_look(shelf, put, monkeypatch):
    monkeypatch.undo()  # with the pause between two looks
    adapters = Adapters(shelf, BASE)

    async def story() -> str:
        await adapters.refresh()
        put(shelf, "helpdesk:2")
        return await adapters.resolve("helpdesk:2")

    assert run(story()) == "helpdesk:2"


def test_many_requests_for_unknown_names_do_not_each_ask_the_registry(shelf, monkeypatch):
    monkeypatch.undo()
    adapters = Adapters(shelf, BASE)

    async def story() -> list[Any]:
        return await asyncio.gather(*(adapters.resolve(f"gone:{number}") for number in range(1, 100)), return_exceptions=True)

    assert {type(error) for error in run(story())} == {UnknownNameError}
    assert shelf.num_asked < 10


def test_the_base_and_fetched_versions_are_found_without_the_registry(shelf):
    adapters = Adapters(shelf, BASE)
    assert run(adapters.resolve("helpdesk:1")) == "helpdesk:1"
    shelf.is_down, asked = True, shelf.num_asked
    assert run(adapters.resolve("helpdesk:1")) == "helpdesk:1"
    assert run(adapters.resolve("smollm2-135m")) == "smollm2-135m"
    assert shelf.num_asked == asked


def test_a_live_adapter_is_fetched_before_its_first_request(shelf):
    adapters = Adapters(shelf, BASE)
    run(adapters.refresh())
    assert shelf.downloads == ["helpdesk:1"]
    run(adapters.refresh())
    assert run(adapters.resolve("helpdesk")) == "helpdesk:1"
    assert shelf.downloads == ["helpdesk:1"]


def test_an_adapter_asked_for_many_times_at_once_is_fetched_once(shelf, put):
    put(shelf, "other:1")
    adapters = Adapters(shelf, BASE)

    async def story() -> list[str]:
        return await asyncio.gather(*(adapters.resolve("other:1") for _ in range(20)))

    assert set(run(story())) == {"other:1"}
    assert shelf.downloads.count("other:1") == 1


def test_names_stay_known_while_the_registry_is_down(shelf, put, caplog):
    put(shelf, "helpdesk:2")
    adapters = Adapters(shelf, BASE)
    run(adapters.refresh())
    shelf.is_down = True
    with caplog.at_level(logging.WARNING):
        run(adapters.refresh())
    assert "the registry does not answer" in caplog.text
    assert adapters.names() == ["smollm2-135m", "helpdesk", "helpdesk:1", "helpdesk:2"]
    assert run(adapters.resolve("helpdesk")) == "helpdesk:1"
    with pytest.raises(UnknownNameError):
        run(adapters.resolve("helpdesk:3"))
    assert why_broken(adapters, "helpdesk:2") == "its files cannot be had from the registry: connection refused"
    shelf.is_down = False
    assert run(adapters.resolve("helpdesk:2")) == "helpdesk:2", "a failed download is tried again"


def test_only_versions_of_this_base_are_listed(shelf, put):
    put(shelf, "other:1")
    shelf.live["other"], shelf.fingerprints["other"] = 1, "f" * 16
    adapters = Adapters(shelf, BASE)
    run(adapters.refresh())
    assert adapters.names() == ["smollm2-135m", "helpdesk", "helpdesk:1"]
    for name in ("other", "other:1"):
        assert why_broken(adapters, name) == f"it was made for some/base, and this engine serves smollm2-135m ({FINGERPRINT})"
    assert "other:1" not in shelf.downloads


def test_live_chatbots_of_another_base_are_no_warning_each_second(shelf, put, caplog):
    put(shelf, "other:1")
    shelf.live["other"], shelf.fingerprints["other"] = 1, "f" * 16
    adapters = Adapters(shelf, BASE)
    with caplog.at_level(logging.WARNING):
        run(adapters.refresh())
        run(adapters.refresh())
    assert [record.getMessage() for record in caplog.records if "other" in record.getMessage()] == []


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


def cut_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:20])


def change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))


def without_lora(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"lm_head.weight": np.ones((2, 2), "float32")}, folder / WEIGHTS)


def with_a_scalar(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"a.lora_A.weight": np.array(1.0, "float32")}, folder / WEIGHTS)


BROKEN = {
    "weights cut short": (cut, "its files cannot be read: "),
    "header cut short": (cut_header, "its files cannot be read: "),
    "empty weights": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "its files cannot be read: "),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "adapter_model.safetensors missing"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "adapter_config.json missing"),
    "bad JSON": (lambda folder: (folder / CONFIG).write_text("{"), "its files cannot be read: "),
    "config in Latin-1": (lambda folder: (folder / CONFIG).write_bytes(b'{"peft_type": "\xe9"}'), "its files cannot be read: "),
    "config is a list": (lambda folder: (folder / CONFIG).write_text("[]"), ""),
    "another kind of adapter": (lambda folder: change(folder, peft_type="IA3"), "it is no LoRA adapter"),
    "weights of no adapter": (without_lora, "it is no LoRA adapter"),
    "a weight without a rank": (with_a_scalar, ""),
    "DoRA": (lambda folder: change(folder, use_dora=True), "it has parts that vLLM cannot serve"),
    "extra modules": (lambda folder: change(folder, modules_to_save=["lm_head"]), "it has parts that vLLM cannot serve"),
    "biases": (lambda folder: change(folder, bias="all"), "it has parts that vLLM cannot serve"),
    "bad JSON in the manifest": (lambda folder: (folder / MANIFEST).write_text("{"), ""),
    "manifest is a list": (lambda folder: (folder / MANIFEST).write_text("[]"), ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_refused_with_the_reason_while_others_go_on(name, shelf, put):
    damage, reason = BROKEN[name]
    damage(put(shelf, "helpdesk:2"))
    adapters = Adapters(shelf, BASE)
    assert why_broken(adapters, "helpdesk:2").startswith(reason)
    assert adapters.fetched("helpdesk:2") is None
    assert run(adapters.resolve("helpdesk:1")) == "helpdesk:1"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_that_is_live_does_not_end_the_watch(name, shelf, put):
    put(shelf, "helpdesk:2")
    BROKEN[name][0](put(shelf, "broken:1"))
    shelf.live["broken"] = 1
    adapters = Adapters(shelf, BASE)
    run(adapters.refresh())
    shelf.live["helpdesk"] = 2
    run(adapters.refresh())
    assert run(adapters.resolve("helpdesk")) == "helpdesk:2"


def test_a_rank_over_the_engines_is_refused_with_both_figures(tmp_path, write_adapter):
    check_adapter(write_adapter(tmp_path / "fits", rank=16), 16)
    with pytest.raises(BrokenAdapterError, match=r"its rank is 17, and the engine makes room for 16 \(serve.max_lora_rank\)"):
        check_adapter(write_adapter(tmp_path / "larger", rank=17), 16)


def test_the_rank_is_read_from_the_weights_not_from_the_config(tmp_path, write_adapter):
    folder = write_adapter(tmp_path / "lies", rank=32)
    change(folder, r=8)
    with pytest.raises(BrokenAdapterError, match="its rank is 32"):
        check_adapter(folder, 16)


def test_a_truncated_download_can_be_replaced(shelf, put):
    cut(put(shelf, "helpdesk:2"))
    adapters = Adapters(shelf, BASE)
    why_broken(adapters, "helpdesk:2")
    put(shelf, "helpdesk:2")
    assert run(adapters.resolve("helpdesk:2")) == "helpdesk:2"


def test_watching_goes_on_whatever_the_registry_does(shelf, put, monkeypatch, home):
    monkeypatch.setattr("serve.adapters.REFRESH_S", 0.001)
    adapters = Adapters(shelf, BASE)

    async def story() -> str:
        watcher = asyncio.create_task(adapters.watch())
        await asyncio.sleep(0)
        shelf.is_down = True
        while shelf.num_asked < 3:
            await asyncio.sleep(0.001)
        shelf.is_down = False
        put(shelf, "helpdesk:2")
        shelf.live["helpdesk"] = 2
        while await adapters.resolve("helpdesk:1") and "helpdesk:2" not in shelf.downloads:
            await asyncio.sleep(0.001)
        assert not watcher.done()
        watcher.cancel()
        return await adapters.resolve("helpdesk")

    assert run(asyncio.wait_for(story(), 30)) == "helpdesk:2"


async def until(what: Callable[[], Awaitable[bool]]) -> None:
    while not await what():
        await asyncio.sleep(0.01)


def test_a_word_is_taken_while_the_registry_has_no_time_and_the_registry_has_the_last_one(shelf, put, home, monkeypatch):
    monkeypatch.setattr("serve.adapters.REFRESH_S", 0.01)
    put(shelf, "helpdesk:2")
    adapters = Adapters(shelf, BASE)

    def say(live: int, canary: int | None = None) -> None:
        aliases = {"live": live, **({"canary": canary} if canary else {})}
        Word(shelf.url).spread({"helpdesk": Standing(aliases, {f"canary_share.{canary}": "0.999"}, 0)})

    async def answers(wanted: str) -> None:
        async def is_so() -> bool:
            return await adapters.resolve("helpdesk") == wanted

        await asyncio.wait_for(until(is_so), 20)

    async def story() -> None:
        await adapters.refresh()
        await adapters.resolve("helpdesk:2")
        shelf.is_down = True
        watcher = asyncio.create_task(adapters.watch())
        await asyncio.sleep(0)
        await answers("helpdesk:1")
        say(live=2)
        await answers("helpdesk:2")
        say(live=1, canary=2)
        await answers("helpdesk:2")
        say(live=3)
        num_asked = shelf.num_asked
        while shelf.num_asked < num_asked + 30:
            await asyncio.sleep(0.01)
        assert await adapters.resolve("helpdesk") == "helpdesk:2", "a version that is not known here is not taken on word"
        shelf.is_down = False
        await answers("helpdesk:1")
        watcher.cancel()

    run(story())


def test_a_word_that_makes_no_sense_does_not_end_the_listening(shelf, put, home, caplog):
    put(shelf, "helpdesk:2")
    adapters = Adapters(shelf, BASE)

    async def story() -> None:
        await adapters.refresh()
        await adapters.resolve("helpdesk:2")
        shelf.is_down = True
        watcher = asyncio.create_task(adapters.watch())
        await asyncio.sleep(LISTEN_S)
        for tags, live in (({"canary_share.2": None}, 1), ({}, 2)):
            Word(shelf.url).spread({"helpdesk": Standing({"live": live, "canary": 2}, tags, 0)})
            await asyncio.sleep(3 * LISTEN_S)

        async def is_known() -> bool:
            return await adapters.resolve("helpdesk") == "helpdesk:2"

        await asyncio.wait_for(until(is_known), 20)
        assert "could not be taken" in caplog.text
        assert not watcher.done()
        watcher.cancel()

    run(story())


def test_a_look_that_began_before_a_word_does_not_take_it_back(shelf, put, home, monkeypatch):
    put(shelf, "helpdesk:2")
    adapters = Adapters(shelf, BASE)
    slow, asked = threading.Event(), threading.Event()
    own = shelf.versions

    def versions(standings: dict[str, Standing] | None = None) -> list[Version]:
        before = own(standings)
        if standings is not None:
            asked.set()
            assert slow.wait(30)
        return before

    async def story() -> None:
        await adapters.refresh()
        shelf.versions = versions
        put(shelf, "helpdesk:3")  # a reason to read the versions
        watcher = asyncio.create_task(adapters.watch())
        await asyncio.to_thread(asked.wait, 30)
        shelf.live["helpdesk"] = 2
        Word(shelf.url).spread({"helpdesk": Standing({"live": 2}, {}, 0)})

        async def is_known() -> bool:
            return await adapters.resolve("helpdesk") == "helpdesk:2"

        await asyncio.wait_for(until(is_known), 20)
        slow.set()
        num_read = shelf.num_read
        while shelf.num_read == num_read:
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


def test_versions_with_foreign_tags_do_no_harm(shelf):
    """An MLflow server of others holds versions that Tandem did not make."""
    adapters = Adapters(shelf, BASE)
    own = shelf.versions

    def with_foreign(standings: dict[str, Standing] | None = None) -> list[Version]:
        return [*own(), replace(own()[0], chatbot="Their Model", tags={}, run_id="", aliases=("live",))]

    shelf.versions = with_foreign
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
