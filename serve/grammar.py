"""Which JSON schemas a request may bring: those that the engine makes a grammar of within a moment, before it computes anything else.

Knows JSON schemas. Does not know the compiler of grammars; the bounds were found by trying it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from serve.refusal import RefusedError

MAX_SCHEMA_BYTES = 32 * 1024
MAX_SCHEMA_DEPTH = 40
MAX_PATTERN_LETTERS = 512
MAX_COUNT = 128  # over it the compiler fails, after a time that grows with the square: 40 s for 30,000
MAX_TOOLS = 128
MAX_BYTES = 128 * 1024
MAX_PATTERNS = 128
MAX_UNROLLED = 16 * 1024
COUNTED = "\x01"
ESCAPED = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]", re.DOTALL)
INNERMOST_GROUP = re.compile(r"\(([^()]*)\)")
COUNT = re.compile(r"\{\s*[\d,]")
COUNTED_AGAIN = re.compile(r"[\x01}][*+?]*\{\s*[\d,]")
NUMBERS = re.compile(r"\{([\s\d,]*\d[\s\d,]*)\}")
PROPERTY_COUNTS = ("minProperties", "maxProperties")
LETTERS_A_PLACE = 4  # what one property at one place takes, in letters of a pattern
OPTIONAL = re.compile(r"[?*+|]")
LETTERS_IF_OPTIONAL = 8  # what may be left out, counted, can be read in many ways


@dataclass
class Work:
    """What the schemas of one request come to; for one of its tools to be called, the engine joins all of them into one."""

    num_bytes: int = 0
    num_patterns: int = 0
    """Regular expressions, and formats, which the compiler makes such of."""
    num_unrolled: int = 0
    """Letters that repetitions are written out to."""

    def check(self, field: str) -> None:
        """Refuse what is too much in all, where no schema is by itself."""
        if self.num_bytes > MAX_BYTES:
            raise RefusedError(400, f"the request's schemas have more than {MAX_BYTES} bytes together", param=field)
        if self.num_patterns > MAX_PATTERNS:
            raise RefusedError(400, f"the request's schemas have more than {MAX_PATTERNS} patterns and formats together", param=field)
        if self.num_unrolled > MAX_UNROLLED:
            raise RefusedError(400, "the request's schemas repeat too much: patterns by {n,m}, or properties by their number", param=field)


def check_grammars(request: dict[str, Any]) -> None:
    """Refuse schemas, of an answer's format or of tools, that would hold up the engine: each by itself, and all together.

    Numbers of items and letters (`maxItems`, `minLength`) have no bound: the compiler does not write them out.

    Raises:
        RefusedError: 400, with the field's name.
    """
    tools = request.get("tools")
    if isinstance(tools, list) and len(tools) > MAX_TOOLS:
        raise RefusedError(400, f"there are {len(tools)} tools; {MAX_TOOLS} at most", param="tools")
    work = Work()
    for field, schema in _schemas(request):
        work.num_bytes += _checked_bytes(field, schema)
        for pattern in _patterns(schema):
            work.num_patterns += 1
            work.num_unrolled += _checked_letters(field, pattern)
        for part in _objects(schema):
            work.num_patterns += isinstance(part.get("format"), str)
            work.num_unrolled += _num_places(part) * LETTERS_A_PLACE
        work.check(field)


def _checked_bytes(field: str, schema: Any) -> int:
    try:
        num_bytes, depth = len(json.dumps(schema)), _depth(schema)
    except RecursionError:
        raise RefusedError(400, "a schema is nested too deeply", param=field) from None
    if num_bytes > MAX_SCHEMA_BYTES:
        raise RefusedError(400, f"a schema has {num_bytes} bytes; {MAX_SCHEMA_BYTES} at most", param=field)
    if depth > MAX_SCHEMA_DEPTH:
        raise RefusedError(400, f"a schema is nested {depth} deep; {MAX_SCHEMA_DEPTH} at most", param=field)
    return num_bytes


def _checked_letters(field: str, pattern: str) -> int:
    """Return to how many letters a pattern's repetitions are written out, if it may be compiled at all."""
    if len(pattern) > MAX_PATTERN_LETTERS or counts_within_counts(pattern):
        reason = f"{MAX_PATTERN_LETTERS} letters at most, and no repetition {{n,m}} within another: it may take for ever to compile"
        raise RefusedError(400, f"a schema's pattern is too much: {reason}", param=field)
    counts = largest_counts(pattern)
    if max(counts, default=0) > MAX_COUNT:
        raise RefusedError(400, f"a schema's pattern repeats more than {MAX_COUNT} times; a text's letters have maxLength", param=field)
    plain = ESCAPED.sub("x", pattern)
    return sum(counts) * len(plain) * (LETTERS_IF_OPTIONAL if OPTIONAL.search(plain) else 1)


def largest_counts(pattern: str) -> list[int]:
    """Return the larger number of each `{n}`, `{n,}` and `{n,m}`, with spaces or without; those in a class too, to be on the safe side."""
    return [max(int(number) for number in re.findall(r"\d+", counted)) for counted in NUMBERS.findall(pattern)]


def _num_places(part: dict[str, Any]) -> int:
    """Count the places at which the compiler looks for each property of an object that is to have so many of them."""
    properties = part.get("properties")
    if not isinstance(properties, dict) or not any(part.get(name) for name in PROPERTY_COUNTS):
        return 0
    most = part.get("maxProperties")
    return len(properties) * (min(len(properties), abs(most)) if isinstance(most, int) else len(properties))


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


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Give every object of a schema, itself among them."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(inner)
