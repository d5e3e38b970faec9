"""The parser of tool calls is chosen by the model's own files."""

import json

import pytest

from serve.tools import choose_tool_parser, taught_parser


@pytest.mark.parametrize(
    ("family", "file", "mark", "parser"),
    [
        ("llama", "tokenizer.json", "<|python_tag|>", "llama3_json"),
        ("llama4", "tokenizer.json", "<|python_start|>", "llama4_pythonic"),
        ("mistral", "tokenizer_config.json", "[TOOL_CALLS]", "mistral"),
        ("qwen2", "chat_template.jinja", "<tool_call>", "hermes"),
        ("qwen3", "tokenizer_config.json", "<tool_call>", "hermes"),
        ("qwen3_moe", "chat_template.jinja", "<tool_call><function=", "qwen3_coder"),
        ("llama", "tokenizer.json", "<tool_call>", "none"),
        ("gpt2", "tokenizer.json", "<tool_call>", "none"),
    ],
)
def test_a_family_has_its_parser_if_the_model_was_taught_calls(family, file, mark, parser, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    assert choose_tool_parser(tmp_path, "auto") == "none"
    (tmp_path / file).write_text(f"... {mark} ...")
    assert taught_parser(tmp_path) == parser
    assert choose_tool_parser(tmp_path, "none") == "none"
