"""What the endpoint says about itself: vLLM's own description, less the routes and fields that the front keeps shut.

Knows OpenAPI. Does not know the engine.
"""

from functools import lru_cache
from typing import Any

from serve.bounds import CLOSED
from serve.protocols import PROTOCOLS
from serve.refusal import App

TEXT = {"type": "string"}
REASON = {"type": "object", "required": ["message", "type"], "properties": {"message": TEXT, "type": TEXT}}
ERROR = {"type": "object", "required": ["error"], "properties": {"error": REASON}}
CARD = {"type": "object", "required": ["id", "object"], "properties": {"id": TEXT, "object": {"const": "model"}}}
MODELS = {"type": "object", "required": ["data"], "properties": {"data": {"type": "array", "items": CARD}}}


@lru_cache(maxsize=1)
def describe(app: App) -> dict[str, Any]:
    """Return the OpenAPI description of what is open; `app` is vLLM's application."""
    whole: dict[str, Any] = app.openapi()  # type: ignore[attr-defined]
    paths = {path: {"post": _operation(whole["paths"][path]["post"])} for path in PROTOCOLS if path in whole["paths"]}
    paths["/v1/models"] = {"get": {"summary": "The names that may be asked for", "responses": {"200": _json("Names", MODELS), **_errors()}}}
    schemas = whole.get("components", {}).get("schemas", {})
    used: dict[str, Any] = {}
    waiting = list(_names(paths))
    while waiting:
        if (name := waiting.pop()) not in used:
            used[name] = _open_fields(schemas[name])
            waiting += _names(used[name])
    door = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": whole["openapi"],
        "info": {"title": "Tandem", "version": "1"},
        "paths": paths,
        "components": {"schemas": used, "securitySchemes": {"key": door}},
        "security": [{"key": []}],
    }


def _operation(operation: dict[str, Any]) -> dict[str, Any]:
    answers = {"200": operation["responses"]["200"], **_errors()}
    return {"summary": operation.get("summary", ""), "requestBody": operation["requestBody"], "responses": answers}


def _errors() -> dict[str, Any]:
    return {"4XX": _json("What is wrong with the request", ERROR), "503": _json("Try again after Retry-After", ERROR)}


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _open_fields(schema: dict[str, Any]) -> dict[str, Any]:
    if "properties" not in schema:
        return schema
    return {**schema, "properties": {name: field for name, field in schema["properties"].items() if name not in CLOSED}}


def _names(value: Any) -> list[str]:
    """Return the schemas that a description refers to."""
    if isinstance(value, list):
        return [name for entry in value for name in _names(entry)]
    if not isinstance(value, dict):
        return []
    own = [value["$ref"].rpartition("/")[2]] if isinstance(value.get("$ref"), str) else []
    return own + [name for entry in value.values() for name in _names(entry)]
