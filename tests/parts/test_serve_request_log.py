"""A request leaves one line in `api` and, where an engine answered, one in `inference`, with the same id and nothing of what was said."""

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from cluster.home import log_folder
from cluster.logs import API, INFERENCE, Streams, set_up, stream_file
from configs.schema import LogConfig
from serve.request_log import request_log
from tests.helpers.front import chat
from tests.unit.test_serve_observed import STREAM

PROMPT = "What is the secret of Quetzalcoatlus?"
TURNS = [{"role": "user", "content": PROMPT}]


def lines(stream: str) -> list[dict[str, Any]]:
    file = stream_file(log_folder(), stream)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def log(home, observers) -> Callable[..., None]:
    """Have requests logged, by these settings."""
    return lambda **settings: observers.append(request_log(Streams(log_folder(), LogConfig(**settings))))


def test_one_line_each_with_the_same_id_and_neither_prompt_nor_key(log, ask, engine, keys):
    log()
    engine.pieces = STREAM
    secret = keys.create("alice")
    headers = [(b"authorization", f"Bearer {secret}".encode()), (b"x-request-id", b"the-one-id")]
    answer = ask("POST", "/v1/chat/completions", {"model": "helpdesk", "messages": TURNS, "stream": True}, headers)
    assert answer.status == 200
    (request,), (answered,) = lines(API), lines(INFERENCE)
    assert {name: request[name] for name in ("request_id", "key_name", "method", "route", "status")} == {
        "request_id": "the-one-id",
        "key_name": "alice",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
    }
    assert request["duration_ms"] > 0
    assert {name: answered[name] for name in ("request_id", "version", "num_prompt_tokens", "num_answer_tokens", "is_whole")} == {
        "request_id": "the-one-id",
        "version": "helpdesk:2",
        "num_prompt_tokens": 7,
        "num_answer_tokens": 3,
        "is_whole": True,
    }
    assert 0 < answered["ttft_ms"] < request["duration_ms"]
    assert answered["tokens_per_s"] > 0
    assert engine.completion_id == f"chatcmpl-{answered['completion_id']}"
    said = "".join(file.read_text() for file in log_folder().iterdir())
    for planted in (PROMPT, "Quetzalcoatlus", secret):
        assert planted not in said


def test_a_refusal_has_a_line_too_and_a_look_at_the_health_none(log, ask, keys):
    log()
    keys.create("alice")
    assert chat(ask).status == 401
    assert ask("GET", "/health").status == 200
    assert [(line["status"], line["key_name"]) for line in lines(API)] == [(401, None)]
    assert lines(INFERENCE) == []


def test_an_operator_may_see_what_is_asked(log, ask):
    log(prompts=True)
    assert ask("POST", "/v1/chat/completions", {"model": "helpdesk", "messages": TURNS}).status == 200
    assert ask("POST", "/v1/completions", {"model": "helpdesk", "prompt": PROMPT}).status == 200
    assert [line["prompt"] for line in lines(INFERENCE)] == [TURNS, PROMPT]


def test_a_failure_is_logged_under_its_requests_id_without_what_it_says(log, ask, engine, monkeypatch):
    logger = logging.getLogger("tandem")
    monkeypatch.setattr(logger, "handlers", logger.handlers[:])
    monkeypatch.setattr(logger, "level", logger.level)

    async def fail(*_: Any) -> None:
        raise KeyError(PROMPT)

    log()
    set_up()
    monkeypatch.setattr(type(engine), "__call__", fail)
    answer = ask("POST", "/v1/chat/completions", {"model": "helpdesk", "messages": TURNS}, [(b"x-request-id", b"r1")])
    assert answer.status == 500
    failed, request = lines(API)
    assert (failed["level"], failed["event"], failed["request_id"], request["status"]) == ("error", "a request failed", "r1", 500)
    assert failed["exception"].endswith("KeyError")
    assert PROMPT not in json.dumps(failed)
