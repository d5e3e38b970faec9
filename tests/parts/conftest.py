"""Fixtures of the tests of parts."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.shelf import Shelf


@pytest.fixture
def look_each_time(monkeypatch):
    """Without a pause between two looks at the registry."""
    monkeypatch.setattr("serve.adapters.MIN_REFRESH_S", 0.0)


@pytest.fixture
def traced():
    """Without a GPU blocks are traced and split, forth and back, but no C++ is made of them, which takes minutes."""
    import torch
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # what an earlier test compiled
    counters.clear()
    if not torch.cuda.is_available():
        torch.compiler.set_default_backend("aot_eager")
    yield
    if not torch.cuda.is_available():
        torch.compiler.set_default_backend("inductor")


@pytest.fixture
def put(tmp_path, write_adapter):
    """Put a good adapter on a shelf."""

    def put_one(shelf: Shelf, name: str, **settings: Any) -> Path:
        shelf.folders[name] = write_adapter(tmp_path / name.replace(":", "-"), **settings)
        return shelf.folders[name]

    return put_one


@pytest.fixture
def adapter_shelf(put) -> Shelf:
    made = Shelf(live={"helpdesk": 1})
    put(made, "helpdesk:1")
    return made
