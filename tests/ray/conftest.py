"""One stack for all tests on a real cluster; it costs half a minute to start."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray.stack import Stack, free_port, make_config, make_tiny_model


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    ports = {name: free_port() for name in ("ray_port", "dashboard_port", "mlflow_port", "chat")}
    stack = Stack(folder / "home", folder, ports)
    done = stack.up()
    assert done.returncode == 0, done.stdout + done.stderr
    yield stack
    done = stack.run("cluster", "down")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def config(stack: Stack, tiny_model: Path) -> Path:
    return make_config(stack.folder, tiny_model, stack.ports["chat"])
