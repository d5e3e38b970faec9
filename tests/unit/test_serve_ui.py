"""The Gradio page, where Gradio is not there."""

import importlib.util

import pytest

BOT = "name: bot\ndata:\n  source: chats.jsonl\n"


@pytest.mark.skipif(importlib.util.find_spec("gradio") is not None, reason="Gradio is installed")
def test_without_gradio_the_page_says_how_to_get_it(command, tmp_path):
    (tmp_path / "bot.yaml").write_text(BOT)
    ended = command("serve", "ui", "bot.yaml")
    assert ended.status == 2
    assert ended.err.startswith("error: the page needs gradio, which is an optional extra\n")
    assert ".venv/bin/uv pip install --python .venv/bin/python 'gradio>=6'" in ended.err
