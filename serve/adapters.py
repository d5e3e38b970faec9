"""Which names may be asked for, which version each means now, and where its files lie.

Knows the registry and adapter files. Does not know HTTP or vLLM.
"""

import asyncio
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.metrics import ADAPTER_LOAD, ADAPTERS_LOADED
from cluster.registry import ADAPTER_FILES, LIVE, MANIFEST_FILE, VERSION_NAME, Registry, Version
from cluster.standing import CANARY, Standing, Word

REFRESH_S = 1.0
LISTEN_S = 0.1
MIN_REFRESH_S = 0.2
REGISTRY_TIMEOUT_S = 10.0
log = logging.getLogger("tandem.inference")


class UnknownNameError(Exception):
    """No base, chatbot or version of this name."""


class BrokenAdapterError(Exception):
    """The version exists, but the engine cannot serve it; the message says why."""


@dataclass(frozen=True)
class Base:
    """The base model of one engine."""

    name: str
    fingerprint: str
    max_lora_rank: int


class Adapters:
    """Names and adapters of one engine.

    The registry is read each second in the background, so that a request never waits for it: a promotion reaches every replica within
    about a second, and those on its own machine sooner, by word. If the registry does not answer, the last known names stay.
    """

    def __init__(self, registry: Registry, base: Base) -> None:
        self.registry, self.base = registry, base
        self._standings: dict[str, Standing] | None = None
        self._versions: dict[str, Version] = {}
        self._live: dict[str, Version] = {}
        self._canaries: dict[str, Version] = {}
        self._folders: dict[str, Path] = {}
        self._system_prompts: dict[str, str] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._refresh_lock = asyncio.Lock()
        self._looked_s = -MIN_REFRESH_S
        self._heard_s = -math.inf

    async def watch(self) -> None:
        """Read the registry for ever, and listen meanwhile: a registry that has no cores to answer with holds up no promotion."""
        await asyncio.gather(self._look_again_and_again(), self._listen())

    async def _listen(self) -> None:
        word = Word(self.registry.url)
        while True:
            try:
                if standings := word.hear():
                    self._take_word(standings)
            except Exception:  # a word that makes no sense, such as a tag that is no text, may not end the watch
                log.exception("a word about the registry could not be taken")
            await asyncio.sleep(LISTEN_S)

    def _take_word(self, standings: dict[str, Standing]) -> None:
        """Let chatbots whose versions are known stand as they are said to; the next look, which begins after this, has the last word."""
        self._heard_s, self._standings = time.monotonic(), None
        self._take([self._as_said(version, standings.get(version.chatbot)) for version in self._versions.values()])

    def _as_said(self, version: Version, said: Standing | None) -> Version:
        if said is None or any(f"{version.chatbot}:{number}" not in self._versions for number in said.aliases.values()):
            return version
        return replace(version, aliases=said.aliases_of(version.number), canary_share=said.canary_share(version.number))

    async def _look_again_and_again(self) -> None:
        """Look each second. What is to be fetched is fetched meanwhile: a large adapter must not hold up a rollback."""
        fetching: asyncio.Task[None] | None = None
        while True:
            try:
                await self._look()
                if fetching is None or fetching.done():
                    fetching = asyncio.create_task(self._fetch_answering())
            except Exception:  # no fault of one adapter may end the watch over all of them
                log.exception("a look at the registry failed")
            ADAPTERS_LOADED.set(len(self._folders))
            await asyncio.sleep(REFRESH_S)

    async def refresh(self) -> None:
        """Read the registry once, and fetch the adapters that now answer for a chatbot."""
        await self._look()
        await self._fetch_answering()

    async def _look(self) -> None:
        asked_s = time.monotonic()
        async with self._refresh_lock:
            if self._looked_s > asked_s:
                return  # another look began after this one was asked for
            await asyncio.sleep(max(0.0, self._looked_s + MIN_REFRESH_S - time.monotonic()))
            self._looked_s = time.monotonic()
            try:
                standings = await asyncio.wait_for(asyncio.to_thread(self.registry.standings), REGISTRY_TIMEOUT_S)
                if standings != self._standings:
                    versions = await asyncio.wait_for(asyncio.to_thread(self.registry.versions, standings), REGISTRY_TIMEOUT_S)
                    if self._heard_s < self._looked_s:  # or else it may be older than what was heard
                        self._take(versions)
                        self._standings = standings
            except Exception as error:  # whatever a registry that is down may raise: serving goes on without it
                log.warning("the registry does not answer, the known names stay: %s", error)

    async def _fetch_answering(self) -> None:
        """Fetch what is live or a canary, so that its first request finds it here."""
        answering = [*self._live.values(), *self._canaries.values()]
        for version in [entry for entry in answering if self._is_ours(entry) and entry.name not in self._folders]:
            try:
                await self._fetch(version)
            except BrokenAdapterError as error:
                log.warning("%s is to answer, but cannot be served: %s", version.name, error)

    def _take(self, versions: Iterable[Version]) -> None:
        self._versions = {version.name: version for version in versions}
        self._live = {version.chatbot: version for version in self._versions.values() if LIVE in version.aliases}
        self._canaries = {version.chatbot: version for version in self._versions.values() if CANARY in version.aliases}

    def names(self) -> list[str]:
        """Return every name that may be asked for: the base, live chatbots, versions."""
        own = [version for version in self._versions.values() if self._is_ours(version)]
        return [
            self.base.name,
            *(chatbot for chatbot, version in self._live.items() if self._is_ours(version)),
            *(entry.name for entry in own),
        ]

    async def resolve(self, name: str, conversation: Callable[[], str] = str) -> str:
        """Return the name that the engine knows: the base's, or that of a fetched version.

        Args:
            name: A base, a chatbot or a version.
            conversation: Gives what stays the same over a conversation; asked while a canary runs, where it decides which version answers.

        Raises:
            UnknownNameError: No such base, chatbot or version.
            BrokenAdapterError: The version cannot be served here.
        """
        if name == self.base.name or name in self._folders:
            return name
        version = self._find(name)
        if version is None and VERSION_NAME.match(name):
            await self._look()  # it may be younger than the last look at the registry
            version = self._find(name)
        if version is None:
            raise UnknownNameError(name)
        canary = self._canaries.get(name)
        # A canary that was not fetched is broken, or not yet here: an experiment is nobody's error.
        if canary and canary.name in self._folders and _draw(conversation(), canary.name) < canary.canary_share:
            return canary.name
        await self._fetch(version)
        return version.name

    def meaning(self, name: str) -> str:
        """Return the version that a name means now, whatever share a canary takes; a base or a version means itself."""
        live = self._live.get(name)
        return live.name if live else name

    def fetched(self, name: str) -> Path | None:
        """Return the folder of a version that was fetched and checked."""
        return self._folders.get(name)

    def system_prompt(self, name: str) -> str | None:
        """Return the system message that a fetched version was trained with."""
        return self._system_prompts.get(name)

    def _find(self, name: str) -> Version | None:
        return self._live.get(name) or self._versions.get(name)

    def _is_ours(self, version: Version) -> bool:
        return version.tags.get("base_fingerprint") == self.base.fingerprint

    async def _fetch(self, version: Version) -> None:
        if version.name in self._folders:
            return
        async with self._locks.setdefault(version.name, asyncio.Lock()):
            if version.name in self._folders:
                return
            if not self._is_ours(version):
                made_for = version.tags.get("base_model", "another base model")
                raise BrokenAdapterError(f"it was made for {made_for}, and this engine serves {self.base.name} ({self.base.fingerprint})")
            began_s = time.perf_counter()
            try:
                folder = await asyncio.to_thread(self.registry.download, version)
            except Exception as error:  # MLflow raises its own, requests' and the system's
                raise BrokenAdapterError(f"its files cannot be had from the registry: {error}") from error
            await asyncio.to_thread(check_adapter, folder, self.base.max_lora_rank)
            try:
                prompt = _read_system_prompt(folder)
            except (ValueError, AttributeError, OSError) as error:
                raise BrokenAdapterError(f"its manifest cannot be read: {error}") from error
            if prompt:
                self._system_prompts[version.name] = prompt
            self._folders[version.name] = folder
            ADAPTER_LOAD.observe(time.perf_counter() - began_s)


def _draw(conversation: str, canary: str) -> float:
    """Return a number from 0 to 1 that is always the same for a conversation and a canary; a greater share keeps those it had."""
    return int.from_bytes(hashlib.sha256(f"{canary}\n{conversation}".encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64


def _read_system_prompt(folder: Path) -> str | None:
    file = folder / MANIFEST_FILE
    prompt = json.loads(file.read_text()).get("system_prompt") if file.is_file() else None
    return str(prompt) if prompt else None


def check_adapter(folder: Path, max_lora_rank: int) -> None:
    """Check that an adapter's files can be read and suit the engine.

    Raises:
        BrokenAdapterError: They cannot, and why.
    """
    from safetensors import SafetensorError, safe_open

    if missing := [name for name in ADAPTER_FILES if not (folder / name).is_file()]:
        raise BrokenAdapterError(f"{' and '.join(missing)} missing")
    try:
        settings = json.loads((folder / ADAPTER_FILES[0]).read_text())
        with safe_open(folder / ADAPTER_FILES[1], "numpy") as weights:
            ranks = {weights.get_slice(name).get_shape()[0] for name in weights.keys() if ".lora_A." in name}  # noqa: SIM118
    except (ValueError, IndexError, OSError, SafetensorError) as error:
        raise BrokenAdapterError(f"its files cannot be read: {error}") from error
    if not ranks or not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise BrokenAdapterError("it is no LoRA adapter")
    if max(ranks) > max_lora_rank:
        raise BrokenAdapterError(f"its rank is {max(ranks)}, and the engine makes room for {max_lora_rank} (serve.max_lora_rank)")
    if settings.get("use_dora") or settings.get("modules_to_save") or settings.get("bias", "none") != "none":
        raise BrokenAdapterError("it has parts that vLLM cannot serve (DoRA, modules_to_save or biases)")
