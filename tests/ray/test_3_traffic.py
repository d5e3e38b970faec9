"""Serving under load, with keys: promotions that lose nothing, a canary, quotas, an engine that is killed.

The versions are trained to say who they are, so that an answer from another's weights shows.
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import anthropic
import httpx
import openai
import psutil
import pytest

from tests.ray.stack import Stack, wait_for

NUM_AT_ONCE = 8
NUM_CHANGES = 20
NUM_ANSWERS = 2  # of each version before the next change
LONG = 96  # tokens: the most that the config allows


def ask(stack: Stack, secret: str, name: str, text: str = "What is number 3?", **settings) -> httpx.Response:
    return stack.ask(name, text, secret=secret, **{"max_tokens": 16, **settings})


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def meaning(stack: Stack, secret: str, name: str) -> str | None:
    """The version that a name means to the replica now; asking does not wait behind answers."""
    listed = httpx.get(f"{stack.endpoint}/models", headers={"Authorization": f"Bearer {secret}"}, timeout=30).json()["data"]
    return next((model["root"] for model in listed if model["id"] == name), None)


@contextmanager
def load(send: Callable[[int], None]) -> Iterator[None]:
    """Send from several threads at once, again and again, until the block ends."""
    done = threading.Event()

    def again(number: int) -> None:
        while not done.is_set():
            send(number)

    threads = [threading.Thread(target=again, args=(number,)) for number in range(NUM_AT_ONCE)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_each_version_says_who_it_is(stack: Stack, secret, speakers):
    for name, words in speakers.items():
        assert text_of(ask(stack, secret, name)) == words


def test_promotions_and_rollbacks_under_load_lose_nothing(stack: Stack, secret, speakers):
    first, second = speakers
    stack.registry.promote(first)
    wait_for(lambda: ask(stack, secret, "speaker").headers.get("x-tandem-model") == first)
    wrong: list[str] = []
    answered: Counter[str] = Counter()

    def send(number: int) -> None:
        try:
            answer = ask(stack, secret, "speaker", f"What is number {number}?")
            spoke = answer.headers.get("x-tandem-model", "")
            if answer.status_code != 200 or answer.json()["model"] != spoke or text_of(answer) != speakers[spoke]:
                wrong.append(answer.text)
            answered[spoke] += 1
        except Exception as error:
            wrong.append(repr(error))

    late_s = []
    with load(send):
        for change in range(NUM_CHANGES):
            wanted = second if change % 2 == 0 else first
            if change % 4 < 2:
                stack.registry.promote(wanted)
            else:
                assert stack.registry.rollback("speaker").name == wanted
            began_s = time.monotonic()
            wait_for(lambda wanted=wanted: meaning(stack, secret, "speaker") == wanted, timeout_s=30)
            late_s.append(time.monotonic() - began_s)
            enough = answered[wanted] + NUM_ANSWERS
            wait_for(lambda wanted=wanted, enough=enough: answered[wanted] >= enough or wrong)
    assert wrong == []
    assert min(answered[name] for name in speakers) >= NUM_CHANGES // 2 * NUM_ANSWERS
    median_s = sorted(late_s)[len(late_s) // 2]
    print(
        f"{sum(answered.values())} answers, {NUM_AT_ONCE} at once; a change was known after {median_s:.2f} s, {max(late_s):.2f} s at most"
    )


def test_a_canary_takes_its_share_and_a_conversation_stays_with_its_version(stack: Stack, secret, speakers):
    first, second = speakers
    stack.registry.promote(first)
    assert stack.run("serve", "canary", second, "--share", "50%").returncode == 0

    def spoke(number: int) -> str:
        answer = ask(stack, secret, "speaker", f"What is number {number}?", max_tokens=4)
        assert answer.status_code == 200, answer.text
        return answer.headers["x-tandem-model"]

    wait_for(lambda: second in {spoke(number) for number in range(12)}, timeout_s=30)
    before = [spoke(number) for number in range(12)]
    assert set(before) == {first, second}
    assert [spoke(number) for number in range(12)] == before
    assert stack.run("serve", "rollback", "speaker").returncode == 0
    wait_for(lambda: {spoke(number) for number in range(12)} == {first}, timeout_s=30)


def test_a_quota_is_429_for_the_official_client_and_tokens_of_streams_count(stack: Stack, speakers):
    name = next(iter(speakers))
    messages = [{"role": "user", "content": "What is number 3?"}]
    client = openai.OpenAI(base_url=stack.endpoint, api_key=stack.make_key("few", "--rpm", "2"), max_retries=0)
    answers: list[object] = []
    with pytest.raises(openai.RateLimitError) as refusal:
        wait_for(lambda: answers.append(client.chat.completions.create(model=name, messages=messages, max_tokens=4)))
    assert len(answers) in (2, 3, 4), "two a minute, and another minute may have begun"
    assert int(refusal.value.response.headers["retry-after"]) <= 60
    assert refusal.value.code == "rate_limit_exceeded"
    short = openai.OpenAI(base_url=stack.endpoint, api_key=stack.make_key("short", "--tpm", "1"), max_retries=0)
    stream = short.chat.completions.create(model=name, messages=messages, max_tokens=4, stream=True)
    assert all(chunk.choices for chunk in stream), "usage that was not asked for is not shown"
    with pytest.raises(openai.RateLimitError):
        wait_for(lambda: not short.chat.completions.create(model=name, messages=messages, max_tokens=4), timeout_s=10)


def error_of(events: Iterable[Any]) -> Exception | None:
    """Follow a stream to its end; return what the client raises."""
    try:
        list(events)
    except (openai.OpenAIError, anthropic.AnthropicError, httpx.HTTPError) as error:
        return error
    return None


def num_asking(stack: Stack, replica: psutil.Process) -> int:
    """The connections of its proxy that a replica has taken up; one at least for each request under way."""
    ports = {link.raddr.port for proxy in stack.parts("haproxy") for link in proxy.net_connections("tcp") if link.raddr}
    return sum(link.status == psutil.CONN_ESTABLISHED and link.laddr.port in ports for link in replica.net_connections("tcp"))


def test_a_killed_replica_ends_its_streams_with_an_error_and_comes_back_by_itself(stack: Stack, secret, speakers, tiny_model):
    name, words = next(iter(speakers.items()))
    (replica,) = stack.workers("ServeReplica")
    messages = [{"role": "user", "content": "What is number 3?"}]
    said: dict[str, Any] = {"model": tiny_model.name, "temperature": 0, "stream": True}
    client = openai.OpenAI(base_url=stack.endpoint, api_key=secret, max_retries=0)
    other = anthropic.Anthropic(base_url=stack.endpoint.removesuffix("/v1"), api_key=secret, max_retries=0)
    patient = openai.OpenAI(base_url=stack.endpoint, api_key=secret, max_retries=100)
    streams = {
        "chat": lambda: client.chat.completions.create(messages=messages, max_tokens=LONG, **said),
        "completions": lambda: client.completions.create(prompt="What is number 3?", max_tokens=LONG, **said),
        "responses": lambda: client.responses.create(input="What is number 3?", max_output_tokens=LONG, **said),
        "messages": lambda: other.messages.create(
            model=tiny_model.name, messages=messages, max_tokens=LONG, stream=True, extra_body={"temperature": 0}
        ),
    }
    engines = stack.workers("EngineCore")
    for engine in engines:
        engine.suspend()  # so that no answer ends before its replica
    with ThreadPoolExecutor(len(streams) + 3) as pool, httpx.Client(headers={"Authorization": f"Bearer {secret}"}, timeout=120) as kept:
        assert kept.get(f"{stack.endpoint}/models").status_code == 200
        begun = dict(zip(streams, pool.map(lambda start: start(), streams.values()), strict=True))
        asked = {"model": tiny_model.name, "messages": messages, "max_tokens": LONG}
        wholes = [
            pool.submit(ask, stack, secret, tiny_model.name, max_tokens=LONG),
            # HAProxy alone would break off the connection of a client who has asked on it before, and say nothing.
            pool.submit(kept.post, f"{stack.endpoint}/chat/completions", json=asked),
        ]
        retried = pool.submit(patient.chat.completions.create, model=tiny_model.name, messages=messages, max_tokens=LONG)
        wait_for(lambda: num_asking(stack, replica) >= len(streams) + len(wholes) + 1)
        replica.kill()
        psutil.wait_procs([replica], timeout=30)
        for engine in engines:
            engine.resume()  # it ends by itself
        errors = dict(zip(streams, pool.map(error_of, begun.values()), strict=True))
        for whole in wholes:
            assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (503, "engine_lost")
            assert whole.result().headers["retry-after"]
        assert retried.result().choices[0].message.content
    for kind, error in errors.items():
        assert type(error) is (anthropic.APIStatusError if kind == "messages" else openai.APIError), f"{kind}: {error!r}"
        assert "the engine was lost" in str(error)
    assert text_of(ask(stack, secret, name)) == words
    assert replica.pid not in [process.pid for process in stack.workers("ServeReplica")]


TAKE_ONCE = """
import asyncio, ray
from serve.keys import Key
from serve.quotas import ClusterQuotas
ray.init(address={address!r}, namespace="other", logging_level="error", log_to_driver=False)
key = Key(name="k", sha256={sha256!r}, rpm=1, created_s=0)
print("spent:", asyncio.run(ClusterQuotas().take(key, 1)).spent)
"""


def test_what_one_process_counted_another_finds_after_its_death(stack: Stack):
    """As two replicas do, of which the first has died."""
    script = TAKE_ONCE.format(address=f"127.0.0.1:{stack.ports['ray_port']}", sha256=uuid4().hex)

    def take() -> str:
        process = stack.begin(sys.executable, "-c", script, job=True)
        said, _ = process.communicate(timeout=120)
        return said.strip().splitlines()[-1]

    assert take() == "spent: None"
    wait_for(lambda: take() == "spent: requests")  # not the next, where another minute began
