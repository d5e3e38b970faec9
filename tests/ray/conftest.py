"""One stack for all tests on a real cluster, one engine, and the versions that several of them ask: each costs half a minute."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.registry import Version
from tests.ray.stack import Stack, make_config, make_tiny_model, own_stack, wait_for


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with own_stack(tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def config(stack: Stack, tiny_model: Path) -> Path:
    return make_config(stack.folder, tiny_model, stack.ports["chat"])


@pytest.fixture(scope="session")
def guide(stack: Stack, config: Path) -> Version:
    """A version of a chatbot `guide`, trained as a Ray job."""
    return stack.train_as_job(config, "name=guide")


@pytest.fixture(scope="session")
def served(stack: Stack, config: Path, guide: Version) -> None:
    """The engine, which found a version as it started."""
    stack.serve(config)


@pytest.fixture(scope="session")
def speakers(stack: Stack, config: Path, served: None) -> dict[str, str]:
    """What each of two versions of a chatbot `speaker` says; both were made while the engine was up, and side by side."""
    with ThreadPoolExecutor() as pool:
        return dict(pool.map(lambda word: stack.train_speaker(config, word), ("red", "blue")))


@pytest.fixture(scope="session")
def secret(stack: Stack) -> str:
    """A key that opens everything. From the first key on none may ask without: tests that do so come first."""
    return stack.make_key("tests")


@pytest.fixture(scope="session")
def live_guide(stack: Stack, guide: Version, served: None, secret: str) -> str:
    """The name of that version of `guide`, when it is live."""
    assert stack.run("serve", "promote", guide.name).returncode == 0
    wait_for(lambda: stack.ask("guide", secret=secret).status_code == 200)
    return guide.name
