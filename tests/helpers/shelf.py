"""A shelf of adapters, which stands where the registry stands: it can be down, and its files can be broken."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.registry import Version
from cluster.standing import Standing
from serve.adapters import Adapters, Base, BrokenAdapterError
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


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def why_broken(adapters: Adapters, name: str) -> str:
    with pytest.raises(BrokenAdapterError) as refused:
        run(adapters.resolve(name))
    return str(refused.value)
