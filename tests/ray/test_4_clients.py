"""Everybody's clients on a real engine: OpenAI's, LangChain's, Anthropic's, curl; and requests that no client would send."""

import asyncio
import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any, Literal

import anthropic
import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from cluster.haproxy import haproxy_binary
from tests.ray.stack import Stack, wait_for

QUESTION = [{"role": "user", "content": "What is number 3?"}]
MAX_TOKENS = 80


class City(BaseModel):
    """Where to go."""

    city: Literal["Paris", "Rome"]


TOOL = {"type": "function", "function": {"name": "travel", "parameters": City.model_json_schema()}}


@pytest.fixture(scope="module")
def client(stack: Stack, secret: str, live_guide: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=stack.endpoint, api_key=secret, max_retries=0)


@pytest.fixture(scope="module")
def blank(tiny_model: Path) -> dict[str, float]:
    """A bias against tokens that are white space alone: a model of random weights would put them into its JSON without end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return {str(token): -100 for token in range(len(tokenizer)) if not tokenizer.decode([token]).strip()}


def test_the_async_client_streams(stack: Stack, secret, live_guide):
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=stack.endpoint, api_key=secret) as client:
            options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 6}
            return [chunk async for chunk in await client.chat.completions.create(model="guide", messages=QUESTION, **options)]

    chunks = asyncio.run(ask())
    assert {chunk.model for chunk in chunks} == {live_guide}
    assert 0 < chunks[-1].usage.completion_tokens <= 6


def test_tools_that_must_be_called_are_called_with_arguments_of_their_schema(client, blank):
    for choice in ("required", {"type": "function", "function": {"name": "travel"}}):
        # A model of random weights calls again and again: one call is enough.
        options = {"tools": [TOOL], "tool_choice": choice, "max_tokens": MAX_TOKENS, "logit_bias": blank, "stop": ["</tool_call>"]}
        (call,) = client.chat.completions.create(model="guide", messages=QUESTION, **options).choices[0].message.tool_calls
        assert call.function.name == "travel"
        City.model_validate_json(call.function.arguments)
    chunks = list(client.chat.completions.create(model="guide", messages=QUESTION, stream=True, **options))
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    City.model_validate_json("".join(call.function.arguments or "" for call in calls))


def test_a_tools_result_goes_back_into_the_conversation(client, live_guide):
    call = {"id": "call_1", "type": "function", "function": {"name": "travel", "arguments": '{"city": "Rome"}'}}
    turns = [
        *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert client.chat.completions.create(model="guide", messages=turns, tools=[TOOL], max_tokens=4).model == live_guide


def test_answers_follow_a_schema(client, blank):
    options: dict[str, Any] = {"max_tokens": MAX_TOKENS, "logit_bias": blank}
    said = client.chat.completions.parse(model="guide", messages=QUESTION, response_format=City, **options)
    assert isinstance(said.choices[0].message.parsed, City)
    answer = client.responses.parse(model="guide", input="Where to?", text_format=City, extra_body={"logit_bias": blank})
    assert isinstance(answer.output_parsed, City)


def test_responses_answer_stream_and_keep_nothing(client, live_guide):
    answer = client.responses.create(model="guide", input="Hi", max_output_tokens=5)
    assert (answer.model, answer.instructions, answer.usage.output_tokens) == (live_guide, "Be brief.", 5)
    again = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer.output_text or "-"}, *QUESTION]
    assert client.responses.create(model="guide", input=again, instructions="Mine.", max_output_tokens=4).instructions == "Mine."
    with client.responses.stream(model="guide", input="Hi", max_output_tokens=16, temperature=0) as stream:
        assert {"response.output_text.delta", "response.completed"} <= {event.type for event in stream}
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="guide", input="Hi", previous_response_id=answer.id)


def test_no_answer_is_longer_than_the_setting_allows(client, stack, secret):
    endless = {"ignore_eos": True}
    assert client.chat.completions.create(model="guide", messages=QUESTION, extra_body=endless).usage.completion_tokens == 96
    assert client.completions.create(model="guide", prompt="Hi", max_tokens=120, extra_body=endless).usage.completion_tokens == 96
    assert client.responses.create(model="guide", input="Hi", extra_body=endless).usage.output_tokens == 96


def test_anthropics_client_asks_streams_and_understands_errors(stack: Stack, secret, live_guide):
    client = anthropic.Anthropic(base_url=stack.endpoint.removesuffix("/v1"), api_key=secret, max_retries=0)
    answer = client.messages.create(model="guide", messages=QUESTION, max_tokens=5)
    assert (answer.model, answer.usage.output_tokens) == (live_guide, 5)
    with client.messages.stream(model="guide", messages=QUESTION, max_tokens=5) as stream:
        assert stream.get_final_message().usage.output_tokens == 5
    with pytest.raises(anthropic.NotFoundError, match="guide"):
        client.messages.create(model="nobody", messages=QUESTION, max_tokens=5)
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="sk-wrong").messages.create(model="guide", messages=QUESTION, max_tokens=5)


def test_tokens_of_responses_and_messages_count_against_a_quota(stack: Stack, live_guide):
    home = stack.endpoint.removesuffix("/v1")
    for path in ("/v1/responses", "/v1/messages"):
        door = {"Authorization": f"Bearer {stack.make_key(f'counted-{path[4:]}', '--tpm', '60')}"}
        body = {"model": "guide", "input": "Hi", "messages": QUESTION, "max_tokens": 40, "max_output_tokens": 40, "stream": True}
        with httpx.stream("POST", home + path, json=body, headers=door, timeout=60) as answer:
            assert answer.status_code == 200
            answer.read()
        # With the same again, since another minute may begin.
        refused = wait_for(lambda door=door, path=path, body=body: is_spent(httpx.post(home + path, json=body, headers=door, timeout=60)))
        assert int(refused.headers["retry-after"]) <= 60


def is_spent(answer: httpx.Response) -> httpx.Response | None:
    return answer if answer.status_code == 429 else None


class Shelf(BaseRetriever):
    """Finds the note that shares most words with a question."""

    notes: list[str]

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        words = set(query.lower().split())
        return [Document(max(self.notes, key=lambda note: len(words & set(note.lower().split()))))]


def test_log_probabilities_of_a_prompt_come_from_adapter_and_base(stack: Stack, client, secret, live_guide, tiny_model):
    """On a CPU vLLM's own way ended the engine, for everybody."""
    for name in (live_guide, tiny_model.name):
        answer = stack.ask(name, secret=secret, prompt_logprobs=1)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["prompt_logprobs"]) == answer.json()["usage"]["prompt_tokens"]
        echoed = client.completions.create(model=name, prompt="What is number 3?", max_tokens=2, echo=True, logprobs=1)
        assert echoed.choices[0].text.startswith("What is number 3?")
        assert len(echoed.choices[0].logprobs.token_logprobs) == echoed.usage.total_tokens


def test_langchain_answers_from_notes(stack: Stack, secret, live_guide):
    notes = Shelf(notes=["Number 3 is 21.", "The cluster starts with python -m cluster up.", "Adapters lie in the registry."])
    prompt = ChatPromptTemplate.from_template("Notes: {notes}\nQuestion: {question}")
    model = ChatOpenAI(model="guide", base_url=stack.endpoint, api_key=secret, max_tokens=8, temperature=0)
    chain = {"notes": notes, "question": lambda question: question} | prompt | model
    answer = chain.invoke("How do I start the cluster ?")
    assert answer.response_metadata["model_name"] == live_guide
    assert answer.usage_metadata["output_tokens"] <= 8
    asked = prompt.invoke({"notes": notes.invoke("How do I start the cluster ?"), "question": "?"}).to_string()
    assert "python -m cluster up" in asked
    assert "".join((chain | StrOutputParser()).stream("How do I start the cluster ?")) == answer.content


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl on this machine")
def test_curl_asks_in_pieces_and_in_an_old_way(stack: Stack, secret, live_guide):
    body = json.dumps({"model": "guide", "messages": QUESTION, "max_tokens": 4})
    door = ["-H", f"Authorization: Bearer {secret}", "-H", "Content-Type: application/json", f"{stack.endpoint}/chat/completions"]
    for way in ([], ["-H", "Transfer-Encoding: chunked"], ["--http1.0"], ["-H", "Expect: 100-continue"]):
        done = subprocess.run(["curl", "-sS", "--max-time", "60", *way, "-d", "@-", *door], input=body, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["model"] == live_guide


ODD = [
    (b"POST //v1/chat/completions HTTP/1.1", 404),
    (b"POST /v1/chat%2Fcompletions%00 HTTP/1.1", 404),
    (b"POST /v1/chat/completions/../../load_lora_adapter HTTP/1.1", 404),
    (b"POST /v1/load%5Flora_adapter HTTP/1.1", 404),
    (b"HEAD /v1/chat/completions HTTP/1.1", 405),
    (b"OPTIONS /v1/chat/completions HTTP/1.1", 405),
    (b"GET //v1/models HTTP/1.1", 404),
    (b"GET /v1/models HTTP/1.0", 200),
    (b"GET /v1/models HTTP/1.1\r\nX-Large: " + b"x" * 200_000, 400 if haproxy_binary() else 431),
    (b"GET /\xff HTTP/1.1", 400),
]


@pytest.mark.parametrize(("lines", "status"), ODD, ids=lambda value: str(value)[:60])
def test_odd_requests_are_refused_by_the_real_server(lines, status, stack: Stack, secret, live_guide):
    with socket.create_connection(("127.0.0.1", stack.ports["chat"]), timeout=30) as line:
        line.sendall(
            lines + b"\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer " + secret.encode() + b"\r\nContent-Length: 0\r\n\r\n"
        )
        said = line.makefile("rb").readline()
    assert int(said.split()[1]) == status


@pytest.fixture(scope="module")
def described(stack: Stack, secret: str, live_guide: str) -> dict[str, Any]:
    url = f"{stack.endpoint.removesuffix('/v1')}/openapi.json"
    assert httpx.get(url).status_code == 401
    return httpx.get(url, headers={"Authorization": f"Bearer {secret}"}).json()


BASIC = {
    "/v1/chat/completions": {"messages": QUESTION, "max_tokens": 4},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 4},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 4},
    "/v1/messages": {"messages": QUESTION, "max_tokens": 4},
}


@pytest.mark.parametrize("path", BASIC)
def test_no_request_makes_the_endpoint_fail(path, described, stack: Stack, secret):
    """What the description allows, what it does not, and a plain request with a few fields of either kind."""
    operation = schemathesis.openapi.from_dict(described)[path]["POST"]
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes))
    door, home = {"Authorization": f"Bearer {secret}"}, stack.endpoint.removesuffix("/v1")
    seen = set()

    @seed(7)
    @settings(max_examples=40, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=cases, num_kept=st.none() | st.integers(1, 3), data=st.data())
    def ask(case, num_kept, data) -> None:
        if isinstance(case.body, dict) and num_kept:
            kept = data.draw(st.lists(st.sampled_from(sorted(case.body)), max_size=num_kept)) if case.body else []
            case.body = {**BASIC[path], **{field: case.body[field] for field in kept}}
        if isinstance(case.body, dict):
            case.body["model"] = "guide"
        answer = case.call(base_url=home, headers={**(case.headers or {}), **door}, timeout=60)
        seen.add(answer.status_code)
        said = answer.content.decode("utf-8")
        assert answer.status_code < 500 or (answer.status_code == 503 and "retry-after" in answer.headers), said
        assert '"code":500' not in said.replace(" ", ""), "an error within a stream"
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    ask()
    assert {200, 400} <= seen, "some were good, and some were not"
