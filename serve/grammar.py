"""Which JSON schemas a request may bring: those that the engine makes a grammar of within a moment, before it computes anything else.

Knows JSON schemas. Does not know the compiler of grammars; the bounds were found by trying it.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from serve.refusal import RefusedError

MAX_SCHEMA_BYTES = 32 * 1024
MAX_SCHEMA_DEPTH = 40
MAX_PATTERN_LETTERS = 512
COUNTED = "\x01"
ESCAPED = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]", re.DOTALL)
INNERMOST_GROUP = re.compile(r"\(([^()]*)\)")
COUNT = re.compile(r"\{[\d,]")
COUNTED_AGAIN = re.compile(r"[\x01}][*+?]*\{[\d,]")


def check_grammars(request: dict[str, Any]) -> None:
    """Refuse a schema, of an answer's format or of a tool, that would hold up the engine.

    Raises:
        RefusedError: 400, with the field's name.
    """
    for field, schema in _schemas(request):
        try:
            text = json.dumps(schema)
            depth = _depth(schema)
        except RecursionError:
            raise RefusedError(400, "a schema is nested too deeply", param=field) from None
        if len(text) > MAX_SCHEMA_BYTES:
            raise RefusedError(400, f"a schema has {len(text)} bytes; {MAX_SCHEMA_BYTES} at most", param=field)
        if depth > MAX_SCHEMA_DEPTH:
            raise RefusedError(400, f"a schema is nested {depth} deep; {MAX_SCHEMA_DEPTH} at most", param=field)
        for pattern in _patterns(schema):
            if len(pattern) > MAX_PATTERN_LETTERS or counts_within_counts(pattern):
                reason = f"{MAX_PATTERN_LETTERS} letters at most, and no repetition {{n,m}} within another: it may take for ever to compile"
                raise RefusedError(400, f"a schema's pattern is too much: {reason}", param=field)


def counts_within_counts(pattern: str) -> bool:
    """Whether a regular expression counts repetitions of what itself has counted repetitions, such as `(a{1,9}){1,9}`."""
    rest = ESCAPED.sub("x", pattern)
    while True:
        smaller = INNERMOST_GROUP.sub(lambda group: COUNTED if COUNTED in group[1] or COUNT.search(group[1]) else "x", rest)
        if COUNTED_AGAIN.search(smaller):
            return True
        if smaller == rest:
            return False
        rest = smaller


def _schemas(request: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Give what makes grammars: the formats of OpenAI's two APIs and of Anthropic's, and the tools' parameters."""
    for field in ("response_format", "text", "output_config"):
        if (wanted := request.get(field)) is not None:
            if isinstance(wanted, dict) and wanted.get("type", "text") not in ("text", "json_object", "json_schema"):
                raise RefusedError(400, "response_format may be text, json_object or json_schema", param=field)
            yield field, wanted
    tools = request.get("tools")
    for tool in tools if isinstance(tools, list) else []:
        yield "tools", tool


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0) if isinstance(value, dict | list) else 0


def _patterns(schema: Any) -> Iterator[str]:
    """Give every regular expression of a schema; a property may be named `pattern`, and is no text then."""
    if isinstance(schema, list):
        for entry in schema:
            yield from _patterns(entry)
    elif isinstance(schema, dict):
        for name, value in schema.items():
            if name == "pattern" and isinstance(value, str):
                yield value
            elif name == "patternProperties" and isinstance(value, dict):
                yield from value
            yield from _patterns(value)
