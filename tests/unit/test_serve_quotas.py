"""How much a key may ask: requests and tokens of a minute, the queue, and what one request may want."""

import asyncio
import json
import time

import pytest

from serve.keys import Key, KeyFile
from serve.meter import Meter
from serve.protocols import PROTOCOLS
from serve.quotas import ClusterQuotas, Counter, QuotaError
from tests.helpers.front import ASKED, BASE, Answer, HereQuotas, chat, make_front, refused

CHAT = PROTOCOLS["/v1/chat/completions"]


def keyed(ask, secret, **changes) -> Answer:
    return ask("POST", "/v1/chat/completions", {**ASKED, **changes}, [(b"authorization", b"Bearer " + secret.encode())])


def test_requests_over_the_quota_are_429_until_the_minute_is_over(ask, keys, quotas, engine, monkeypatch):
    secret, other = keys.create("alice", rpm=2), keys.create("bob", rpm=2)
    first = keyed(ask, secret)
    assert (first.headers[b"x-ratelimit-limit-requests"], first.headers[b"x-ratelimit-remaining-requests"]) == (b"2", b"1")
    assert keyed(ask, secret).headers[b"x-ratelimit-remaining-requests"] == b"0"
    answer = keyed(ask, secret)
    assert answer.status == 429
    assert 1 <= int(answer.headers[b"retry-after"]) <= 60
    assert answer.headers[b"x-ratelimit-remaining-requests"] == b"0"
    error = answer.json["error"]
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert error["message"].startswith("the key alice may use 2 requests a minute; try again in ")
    assert len(engine.bodies) == 2
    assert keyed(ask, other).status == 200, "each key has its own"
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 50)
    assert keyed(ask, secret).status == 429
    monkeypatch.setattr(time, "time", lambda: now() + 61)
    assert keyed(ask, secret).status == 200


def test_what_is_refused_for_another_reason_does_not_count(ask, keys):
    secret = keys.create("alice", rpm=1)
    assert keyed(ask, secret, model="nobody").status == 404
    assert keyed(ask, secret, n=1000).status == 400
    assert keyed(ask, secret).status == 200


def remaining(answer: Answer) -> int:
    return int(answer.headers[b"x-ratelimit-remaining-tokens"])


def test_tokens_are_counted_from_the_usage_that_the_engine_states(ask, keys, engine):
    """The prompt's are guessed and taken at once; a usage of 200 covers the guess."""
    secret = keys.create("alice", tpm=350)
    engine.pieces = (json.dumps({"choices": [{}], "usage": {"total_tokens": 200}}).encode(),)
    assert 250 < remaining(keyed(ask, secret, stream=False)) < 350
    assert 50 < remaining(keyed(ask, secret, stream=False)) < 150
    answer = keyed(ask, secret, stream=False)
    assert answer.status == 429
    assert answer.json["error"]["type"] == "tokens"


def test_a_stream_is_asked_for_its_usage_which_the_client_sees_only_if_it_asked_too(ask, keys, engine):
    secret = keys.create("alice", tpm=1000)
    engine.pieces = (b'data: {"choices":[{}]}\n\n', b'data: {"choices":[],"usage":{"total_tokens":300}}\n\n', b"data: [DONE]\n\n")
    answer = keyed(ask, secret, stream_options={"continuous_usage_stats": True})
    assert engine.request["stream_options"] == {"include_usage": True}
    assert answer.pieces == [engine.pieces[0], engine.pieces[2], b""]
    answer = keyed(ask, secret, stream_options={"include_usage": True})
    assert 600 < remaining(answer) < 700
    assert answer.pieces == [*engine.pieces, b""]


def test_a_long_prompt_is_paid_for_before_its_answer_comes(ask, keys, engine):
    """Also by a client that goes away, and by those that ask at the same time."""
    secret = keys.create("alice", tpm=1000)
    engine.pieces = ()
    assert keyed(ask, secret, messages=[{"role": "user", "content": "x" * 3800}]).status == 200
    assert remaining(keyed(ask, secret)) < 50


def test_a_stream_that_breaks_off_is_counted_by_its_events():
    meter = Meter({"stream": True}, CHAT)
    for body in [b'data: {"choices":[{}]}\n\n'] * 5 + [b"data: [DONE]\n\n", b'{"error":{}}']:
        assert meter.passes({"type": "http.response.body", "body": body})
    assert meter.num_tokens(7) == 12


@pytest.mark.parametrize("body", [b"", b"no json", b'{"usage":null}', b"[]", b'{"error":{}}'])
def test_an_answer_without_usage_costs_its_prompt(body):
    meter = Meter({}, CHAT)
    assert meter.passes({"type": "http.response.body", "body": body})
    assert meter.num_tokens(7) == 7


def test_a_key_without_quotas_asks_nobody(shelf, engine, keys, ask, quotas):
    secret = keys.create("alice")
    assert not [name for name in keyed(ask, secret).headers if name.startswith(b"x-ratelimit")]
    assert quotas.counter.limiter.storage.storage == {}


def test_quotas_that_cannot_be_counted_shut_the_door(ask, keys, quotas, monkeypatch):
    async def fail(key, num_tokens):
        raise QuotaError("gone")

    secret = keys.create("alice", rpm=5)
    monkeypatch.setattr(quotas, "take", fail)
    answer = keyed(ask, secret)
    assert refused(answer, 503)["type"] == "service_unavailable"
    assert answer.headers[b"retry-after"] == b"1"


def test_one_minute_for_each_kind_and_key():
    counter = Counter()
    assert counter.take("a", {"requests": 1, "tokens": 5}, 1).spent is None
    counter.spend("a", 5, 9)
    assert counter.take("a", {"requests": 1, "tokens": 5}, 1).standings["tokens"].remaining == 0
    assert counter.take("b", {"requests": 1}, 1).spent is None
    assert counter.take("a", {"tokens": 5}, 1).spent == "tokens"


def test_of_two_spent_quotas_the_one_that_keeps_longest_says_when_to_come_again(monkeypatch):
    counter, now = Counter(), time.time
    counter.take("a", {"tokens": 1}, 1)
    monkeypatch.setattr(time, "time", lambda: now() + 30)
    counter.take("a", {"requests": 1}, 1)
    refusal = counter.take("a", {"tokens": 1, "requests": 1}, 1)
    assert refusal.spent == "requests"
    assert refusal.retry_s > 50


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["a"] * 9},
        {"prompt": [[1]] * 9},
        {"prompt": ["a"] * 5, "n": 2},
    ],
    ids=str,
)
def test_many_prompts_are_many_answers(body, ask, engine):
    assert refused(ask("POST", "/v1/completions", {"model": "helpdesk:1", **body}), 400)["param"] == "prompt"
    assert ask("POST", "/v1/completions", {"model": "helpdesk:1", "prompt": [1] * 500}).status == 200, "tokens of one prompt"
    assert len(engine.bodies) == 1


def test_a_failure_of_our_own_is_an_error_in_openais_shape_and_frees_its_place(shelf, tmp_path):
    async def engine(scope, receive, send):
        raise KeyError("a secret of the prompt")

    front = make_front(engine, shelf, KeyFile(tmp_path / "keys.json"), max_num_seqs=1, max_waiting_requests=0)

    async def ask_one() -> Answer:
        async def receive():
            return {"type": "http.request", "body": json.dumps({**ASKED, "model": BASE.name}).encode(), "more_body": False}

        answer = Answer()
        await front({"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}, receive, answer.send)
        return answer

    for _ in range(2):
        error = refused(asyncio.run(ask_one()), 500)
        assert error["message"] == "the endpoint failed (KeyError); its log says more"
    assert front.num_in_flight == 0


TOO_MUCH = [
    *({"n": 9}, {"best_of": 9}, {"top_logprobs": 21}, {"logprobs": 21}, {"n": "2"}, {"n": True}, {"n": 1.5}),
    *({"stop": ["x"] * 17}, {"stop": "x" * 257}, {"stop_token_ids": [1] * 17}, {"stream": "yes"}, {"stream": 1}),
]


@pytest.mark.parametrize("field", TOO_MUCH, ids=lambda field: f"{next(iter(field))}-{str(next(iter(field.values())))[:9]}")
def test_a_request_that_wants_too_much_is_refused(field, ask, engine):
    assert refused(chat(ask, **field), 400)["param"] == next(iter(field))
    assert engine.bodies == []


@pytest.mark.parametrize(
    "field", [{"n": 8}, {"n": None}, {"logprobs": True}, {"logprobs": 5}, {"stop": "x"}, {"stop": ["x"] * 16}], ids=str
)
def test_a_request_within_bounds_goes_on(field, ask, engine):
    assert chat(ask, **field).status == 200


def test_a_full_queue_is_503_and_a_place_is_free_again_after_an_answer(shelf, tmp_path):
    """Three at once where one is computed and one may wait."""
    free = asyncio.Event()

    async def engine(scope, receive, send):
        await receive()
        await free.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask_three() -> list[Answer]:
        front = make_front(engine, shelf, KeyFile(tmp_path / "keys.json"), HereQuotas(), max_num_seqs=1, max_waiting_requests=1)
        await front.adapters.refresh()
        body = json.dumps(ASKED).encode()

        async def ask_one() -> Answer:
            async def receive():
                return {"type": "http.request", "body": body, "more_body": False}

            answer = Answer()
            await front({"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}, receive, answer.send)
            return answer

        waiting = [asyncio.create_task(ask_one()) for _ in range(2)]
        await asyncio.sleep(0)
        while front.num_in_flight < 2:
            await asyncio.sleep(0.01)
        third = await ask_one()
        free.set()
        return [*await asyncio.gather(*waiting), third, await ask_one()]

    answers = asyncio.run(ask_three())
    assert [answer.status for answer in answers] == [200, 200, 503, 200]
    assert answers[2].json["error"]["code"] == "overloaded"
    assert answers[2].headers[b"retry-after"] == b"1"


class Actor:
    """The counter, as an actor answers: later, and once it was told to; or it fails."""

    def __init__(self) -> None:
        self.counter, self.calls, self.may_answer, self.fails = Counter(), [], asyncio.Event(), False
        self.take_all = self

    async def remote(self, asked, spent):
        self.calls.append((len(asked), len(spent)))
        await self.may_answer.wait()
        if self.fails:
            raise ValueError("it is gone")
        return self.counter.take_all(asked, spent)


def test_requests_that_come_while_the_counter_is_asked_are_asked_together_and_each_has_its_own_answer():
    async def ask_many():
        quotas, actor, key = ClusterQuotas(), Actor(), Key(name="alice", sha256="hash", created_s=0, rpm=4, tpm=1000)
        quotas._actor = actor
        first = asyncio.create_task(quotas.take(key, 1))
        await asyncio.sleep(0.01)
        others = [asyncio.create_task(quotas.take(key, 10)) for _ in range(4)]
        quotas.spend(key, 100)
        await asyncio.sleep(0.01)
        assert actor.calls == [(1, 0)]
        actor.may_answer.set()
        admissions = [await first, *[await one for one in others]]
        assert [one.spent for one in admissions] == [None] * 4 + ["requests"]
        assert [one.standings["tokens"].remaining for one in admissions[:4]] == [999, 889, 879, 869]
        quotas.spend(key, 0)
        quotas.spend(key, 9)
        await asyncio.sleep(0.01)
        assert actor.calls == [(1, 0), (4, 1), (0, 1)]

    asyncio.run(ask_many())


def test_a_counter_that_fails_fails_whoever_waits_and_is_asked_again():
    async def ask_many():
        quotas, actor, key = ClusterQuotas(), Actor(), Key(name="alice", sha256="hash", created_s=0, rpm=9)
        quotas._actor, actor.fails = actor, True
        actor.may_answer.set()
        found = await asyncio.gather(*[quotas.take(key, 1) for _ in range(3)], return_exceptions=True)
        assert [type(one) for one in found] == [QuotaError] * 3
        actor.fails = False
        assert (await quotas.take(key, 1)).standings["requests"].remaining == 8
        actor.may_answer.clear()
        waiting = [asyncio.create_task(quotas.take(key, 1)) for _ in range(3)]
        await asyncio.sleep(0.01)
        left = asyncio.create_task(quotas.take(key, 1))
        await asyncio.sleep(0.01)
        left.cancel()
        last = asyncio.create_task(quotas.take(key, 1))
        await asyncio.sleep(0.01)
        actor.may_answer.set()
        assert [(await one).standings["requests"].remaining for one in waiting] == [7, 6, 5]
        assert (await last).standings["requests"].remaining == 4, "whose client has left is not counted"

    asyncio.run(ask_many())


def test_nobody_waits_for_ever_whatever_ends_the_one_who_asks(monkeypatch):
    async def ask_twice():
        quotas, actor, key = ClusterQuotas(), Actor(), Key(name="alice", sha256="hash", created_s=0, rpm=9)
        quotas._actor = actor
        first = asyncio.create_task(quotas.take(key, 1))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(quotas.take(key, 1))
        await asyncio.sleep(0.01)
        actor.may_answer.set()
        await asyncio.wait_for(asyncio.gather(first, second), 5)

    def fail(*_):
        raise RuntimeError("no metrics here")

    monkeypatch.setattr("serve.quotas._tell", fail)
    asyncio.run(ask_twice())
