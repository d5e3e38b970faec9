"""What is seen of a request: who asked, what answered, when it began and ended, and how many tokens passed."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from serve.keys import KeyFile
from serve.observed import CLIENT_LEFT, NUM_TOLD_AT_ONCE, EngineTimes, Observed, Watch
from tests.helpers.front import ASKED, Answer, make_front

USAGE = b'{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}'
TOKEN = b'data: {"choices":[{"index":0}]}\n\n'
STREAM = (TOKEN, TOKEN, TOKEN, b"data: " + USAGE + b"\n\n", b"data: [DONE]\n\n")


@pytest.fixture
def see(ask, observers) -> Callable[..., tuple[Observed, Answer]]:
    """Send one request; return what was seen of it, and the answer."""
    found: list[Observed] = []
    observers.append(found.append)

    def send(path: str = "/v1/chat/completions", body: Any = ASKED, headers: Any = (), method: str = "POST") -> tuple[Observed, Answer]:
        answer = ask(method, path, body, headers)
        return found[-1], answer

    return send


def test_a_stream_is_seen_with_its_tokens_which_the_client_need_not_ask_for(see, engine, keys):
    engine.pieces = STREAM
    secret = keys.create("alice")
    seen, answer = see(headers=[(b"authorization", f"Bearer {secret}".encode()), (b"x-request-id", b"mine-1")])
    assert (seen.request_id, seen.method, seen.route, seen.status, seen.is_whole) == (
        "mine-1",
        "POST",
        "/v1/chat/completions",
        200,
        True,
    )
    assert (seen.key_name, seen.version) == ("alice", "helpdesk:2")
    assert (seen.num_prompt_tokens, seen.num_answer_tokens) == (7, 3)
    assert 0 < seen.ttft_s < seen.duration_s
    assert seen.tpot_s == pytest.approx((seen.duration_s - seen.ttft_s) / 2)
    assert answer.pieces == [*STREAM[:3], STREAM[4], b""], "the usage is kept from a client that did not ask"
    assert seen.completion_id.startswith("mine-1-")
    assert engine.completion_id == f"chatcmpl-{seen.completion_id}"


def test_a_whole_answer_has_no_first_token(see, engine):
    engine.pieces = (USAGE,)
    seen, _ = see(body={**ASKED, "stream": False})
    assert (seen.num_prompt_tokens, seen.num_answer_tokens, seen.ttft_s, seen.tpot_s) == (7, 3, None, None)


@pytest.mark.parametrize(
    ("path", "pieces", "tokens"),
    [
        ("/v1/completions", (b'{"usage":{"prompt_tokens":2,"completion_tokens":5,"total_tokens":7}}',), (2, 5)),
        ("/v1/responses", (b'{"usage":{"input_tokens":2,"output_tokens":5,"total_tokens":7}}',), (2, 5)),
        ("/v1/messages", (b'{"usage":{"input_tokens":2,"cache_read_input_tokens":4,"output_tokens":5}}',), (6, 5)),
    ],
)
def test_every_protocol_states_its_tokens(path, pieces, tokens, see, engine):
    engine.pieces = pieces
    said = {"prompt": "Hi", "input": "Hi", "messages": ASKED["messages"], "max_tokens": 8}
    seen, _ = see(path, {"model": "helpdesk", **said})
    assert (seen.num_prompt_tokens, seen.num_answer_tokens) == tokens


def test_a_stream_that_breaks_off_has_its_events_and_no_end(see, engine):
    engine.pieces = STREAM[:2]
    seen, _ = see()
    assert (seen.num_prompt_tokens, seen.num_answer_tokens) == (None, 2)


def test_a_refusal_is_seen_under_a_route_of_ours(see, keys):
    keys.create("alice")
    seen, answer = see()
    assert (seen.status, answer.status, seen.key_name, seen.version, seen.num_answer_tokens) == (401, 401, None, None, None)
    seen, _ = see("/v1/whatever/a/client/thinks/of", headers=[(b"authorization", b"Bearer sk-tandem-operator")])
    assert (seen.status, seen.route, seen.key_name) == (404, "other", "tandem")


@pytest.mark.parametrize("given", [b"", b"a b", b"x" * 65, b"a.b", "é".encode(), b"{}", b"../x", b"a\n"])
def test_a_request_id_of_another_shape_is_replaced(given, see):
    seen, _ = see("/health", headers=[(b"x-request-id", given)], method="GET")
    assert seen.request_id.replace("-", "").replace("_", "").isalnum()
    assert seen.request_id.encode() != given


def test_a_client_that_leaves_before_the_answer_is_seen(shelf, tmp_path):
    async def engine(scope, receive, send):
        raise asyncio.CancelledError

    front = make_front(engine, shelf, KeyFile(tmp_path / "keys.json"))
    found: list[Observed] = []
    front.watch.observers.append(found.append)

    async def receive():
        return {"type": "http.request", "body": json.dumps({**ASKED, "model": "smollm2-135m"}).encode()}

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(front({"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}, receive, Answer().send))
    assert [(seen.status, seen.is_whole) for seen in found] == [(CLIENT_LEFT, False)]


def test_a_client_that_the_engines_application_sees_leave_is_seen_too(shelf, keys):
    """vLLM then answers with nothing, which goes to nobody."""

    async def engine(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"null"})

    front = make_front(engine, shelf, keys)
    found: list[Observed] = []
    front.watch.observers.append(found.append)
    coming = iter([{"type": "http.request", "body": json.dumps({**ASKED, "model": "smollm2-135m"}).encode()}, {"type": "http.disconnect"}])

    async def receive():
        return next(coming)

    asyncio.run(front({"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}, receive, Answer().send))
    assert [(seen.status, seen.is_whole) for seen in found] == [(CLIENT_LEFT, False)]


def test_requests_are_told_of_later_in_their_order_and_none_is_lost_at_the_end():
    async def run() -> None:
        watch.later_s = 0.01
        for seen in asked:
            watch.end(seen)
        assert told == []
        while len(told) < len(asked):
            await asyncio.sleep(0.005)
        watch.end(asked[0])
        watch.tell()

    told: list[Observed] = []
    watch = Watch([told.append])
    asked = [Observed(str(number), "POST", "/v1/completions") for number in range(3 * NUM_TOLD_AT_ONCE + 1)]
    asyncio.run(asyncio.wait_for(run(), 10))
    assert told == [*asked, asked[0]]


def test_an_observer_that_fails_fails_no_answer_and_no_other_observer(see, observers, caplog):
    observers.insert(0, lambda seen: 1 / 0)
    seen, answer = see()
    assert (seen.status, answer.status) == (200, 200)
    assert "a request could not be told of" in caplog.text


def test_what_the_engine_says_of_a_request_is_part_of_it_and_nothing_is_kept(shelf, engine, keys):
    """As vLLM names them: with a number for completions, and once for each of several answers."""
    front = make_front(engine, shelf, keys)
    times = EngineTimes(queue_s=0.5, prefill_s=0.25, decode_s=1.0, num_prompt_tokens=7, num_answer_tokens=3)
    seen = Observed("asked", "POST", "/v1/completions")
    seen.completion_id = front.feedback.ids.make("helpdesk:2", None, seen.request_id)
    front.watch.begin(seen.completion_id)
    for engine_id in (f"cmpl-{seen.completion_id}-0", f"cmpl-{seen.completion_id}-1", "cmpl-asked-other.seal.v", "chatcmpl-1"):
        front.watch.note(engine_id, times)
    front.watch.end(seen)
    assert seen.engine == EngineTimes(0.5, 0.25, 1.0, 7, 6)
    assert (seen.engine.ttft_s, seen.engine.tpot_s) == (0.75, 0.2)
    front.watch.note(f"cmpl-{seen.completion_id}-0", times)
    again = Observed("asked", "POST", "/v1/completions")
    again.completion_id = seen.completion_id
    front.watch.end(again)
    assert again.engine is None
