"""Which of vLLM's parsers reads a model's tool calls.

Knows the files of a base model, and vLLM's parsers by name. Does not know requests.
"""

import json
import logging
from pathlib import Path

from configs.errors import ConfigError

OFF = "none"
FAMILIES = {
    "llama": ("llama3_json", "<|python_tag|>"),
    "llama4": ("llama4_pythonic", "<|python_start|>"),
    "mistral": ("mistral", "[TOOL_CALLS]"),
    "qwen2": ("hermes", "<tool_call>"),
    "qwen2_moe": ("hermes", "<tool_call>"),
    "qwen3": ("hermes", "<tool_call>"),
    "qwen3_moe": ("hermes", "<tool_call>"),
}
"""Parser by `model_type`, and the mark of a call, which the model's tokenizer or template has if this model was taught to make any."""
CODER_MARK, CODER_PARSER = "<function=", "qwen3_coder"
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")
MARKED_FILES = (*TEMPLATE_FILES, "tokenizer.json", "tekken.json")

log = logging.getLogger("tandem.inference")


def choose_tool_parser(folder: Path, wanted: str) -> str:
    """Return the parser for a base model, or `none`; `wanted` is `serve.tool_parser`.

    Raises:
        ConfigError: It was named, and does not suit the model.
    """
    if wanted == "auto":
        return _suiting(folder, taught_parser(folder))
    check_tool_parser(folder, wanted)
    return wanted


def taught_parser(folder: Path) -> str:
    """Return the parser of the calls that a base model was taught to make, by its files; `none` if it was not."""
    parser, mark = FAMILIES.get(json.loads((folder / "config.json").read_text()).get("model_type"), (OFF, ""))
    texts = {name: (folder / name).read_text(errors="replace") for name in MARKED_FILES if (folder / name).is_file()}
    if not any(mark in text for text in texts.values()):
        return OFF
    if parser == "hermes" and any(CODER_MARK in texts.get(name, "") for name in TEMPLATE_FILES):
        return CODER_PARSER
    return parser


def _suiting(folder: Path, parser: str) -> str:
    """Return the parser, or `none` where it would not work: nobody asked for it by name, and chats need none."""
    try:
        check_tool_parser(folder, parser)
    except ConfigError as error:
        log.warning("tools are off: %s", error)
        return OFF
    return parser


def check_tool_parser(folder: Path, parser: str) -> None:
    """Check that vLLM has a parser and that it suits the model's tokenizer: else each request with tools would fail.

    Raises:
        ConfigError: It does not, and why.
    """
    if parser == OFF:
        return
    from vllm.tokenizers import get_tokenizer
    from vllm.tool_parsers import ToolParserManager

    known = ToolParserManager.list_registered()
    if parser not in known:
        raise ConfigError(f"serve.tool_parser={parser}: vLLM has no such parser", f"there are: {', '.join(sorted(known))}", "auto or none")
    try:
        ToolParserManager.get_tool_parser(parser)(get_tokenizer(str(folder)))
    except Exception as error:  # each parser has its own way to say that a token is missing
        raise ConfigError(f"serve.tool_parser={parser} does not suit this model", str(error), "serve.tool_parser=none") from error
