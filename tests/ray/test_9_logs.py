"""What the suite left in the logs: one id from a request's header to its feedback, lines of all that ran, and no secrets.

The cluster of the other tests is looked through for secrets as it ends, as this one is once more: see `own_stack`.
"""

import json
from collections.abc import Callable
from typing import Any

import httpx

from cluster.logs import API, INFERENCE, SYSTEM, TRAINING, stream_file
from data.feedback_store import read_feedback
from tests.helpers.leaks import leaks
from tests.ray.stack import Stack, wait_for

PROMPT = "What does Quetzalcoatlus northropi weigh?"
REQUEST_ID = "one-id-from-header-to-row"


def lines(stack: Stack, stream: str, **fields: Any) -> list[dict[str, Any]]:
    """The lines of a stream that have these values."""
    files = stream_file(stack.home / "logs", stream).parent.glob(f"{stream}.jsonl*")
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [line for line in found if fields.items() <= line.items()]


def some(stack: Stack, stream: str, is_meant: Callable[[dict[str, Any]], Any] = bool, **fields: Any) -> dict[str, Any]:
    """One of them, as soon as there is one."""
    return wait_for(lambda: next(filter(is_meant, lines(stack, stream, **fields)), None))


def test_one_id_leads_from_the_header_to_the_engine_the_log_and_the_feedback(stack: Stack, live_guide, secret):
    headers = {"Authorization": f"Bearer {secret}", "X-Request-Id": REQUEST_ID}
    asked = {"model": "guide", "messages": [{"role": "user", "content": PROMPT}], "min_tokens": 4, "max_tokens": 4, "stream": True}
    answer = httpx.post(f"{stack.endpoint}/chat/completions", json=asked, headers=headers, timeout=240)
    assert answer.headers["x-request-id"] == REQUEST_ID
    completion_id = json.loads(answer.text.splitlines()[0].removeprefix("data: "))["id"]
    opinion = {"completion_id": completion_id, "rating": "up"}
    assert httpx.post(f"{stack.endpoint}/feedback", json=opinion, headers=headers, timeout=30).status_code == 200

    request = some(stack, API, request_id=REQUEST_ID, route="/v1/chat/completions")
    assert (request["key_name"], request["status"]) == ("tests", 200)
    answered = some(stack, INFERENCE, request_id=REQUEST_ID)
    assert completion_id == f"chatcmpl-{answered['completion_id']}"
    assert (answered["num_prompt_tokens"] > 0, answered["num_answer_tokens"], answered["is_whole"]) == (True, 4, True)
    assert 0 <= answered["queue_ms"] < answered["engine_ttft_ms"] < request["duration_ms"]
    assert 0 < answered["ttft_ms"] < request["duration_ms"]
    assert answered["version"] == answer.headers["x-tandem-model"]
    (row,) = [row for row in read_feedback(f"sqlite:///{stack.home}/feedback.db") if row["completion_id"] == completion_id]
    assert row["completion_id"].startswith(f"chatcmpl-{REQUEST_ID}-")
    shown = stack.run("cluster", "logs", "--find", REQUEST_ID).stdout.splitlines()
    assert [json.loads(line)["stream"] for line in shown].count(INFERENCE) == 1


def test_workers_and_cards_write_to_the_same_files(stack: Stack, guide):
    begun = some(stack, TRAINING, run=guide.run_id, event="begun")
    trained = some(stack, TRAINING, run=guide.run_id, event="trained")
    assert trained["pid"] != begun["pid"], "a worker's own line"
    assert {"epoch", "step", "loss", "learning_rate", "tokens_per_s", "memory_gib"} <= trained.keys()
    assert some(stack, SYSTEM, event="host")["memory_used_gib"] > 0
    for card in json.loads((stack.home / "cluster.json").read_text())["cards"]:
        some(stack, SYSTEM, lambda line: line.get("memory_used_gib"), event="card", card=card["card"])


def test_no_log_has_a_secret_a_key_a_row_or_a_prompt(stack: Stack, live_guide, secret):
    assert stack.ask("guide", PROMPT, secret=secret).status_code == 200
    names = {file.name for file in stack.logs}
    assert {"api.jsonl", "arbiter.log", "card0.log", "inference.jsonl", "system.jsonl", "training.jsonl"} <= names
    assert any(name.startswith("raylet") for name in names), "Ray's own too"
    assert secret in stack.planted.values()
    assert leaks(stack.logs, {**stack.planted, "a prompt": "Quetzalcoatlus"}) == []
    assert leaks(stack.logs, {"what a log may have": live_guide}), "what is there is found"
