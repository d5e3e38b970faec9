"""Serving on a real engine: names, aliases, broken adapters, streams, what is closed."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from serve.keys import LOOK_EVERY_S
from tests.ray.stack import Stack, wait_for


def engine_pids(stack: Stack) -> list[int]:
    return sorted(process.pid for process in stack.workers("EngineCore") + stack.workers("VLLM::"))


def test_base_versions_and_live_alias_answer_by_name(stack: Stack, guide, speakers, tiny_model):
    first, second = speakers
    before = engine_pids(stack)
    assert stack.ask(tiny_model.name).status_code == 200
    for name in (guide.name, first, second):
        answer = stack.ask(name)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == answer.headers["x-tandem-model"] == name
    assert stack.ask("speaker").status_code == 404, "nothing is live yet"
    for name in (first, second):
        assert stack.run("serve", "promote", name).returncode == 0
        wait_for(lambda name=name: stack.ask("speaker").headers.get("x-tandem-model") == name)
    assert stack.run("serve", "rollback", "speaker").returncode == 0
    wait_for(lambda: stack.ask("speaker").headers.get("x-tandem-model") == first)
    assert engine_pids(stack) == before, "an engine restarted"


def test_versions_answer_with_their_own_weights(stack: Stack, speakers, tiny_model):
    def score(name: str) -> tuple[float, ...]:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        said = stack.ask(name, logprobs=True, messages=messages).json()["choices"][0]["logprobs"]["content"]
        return tuple(token["logprob"] for token in said)

    scores = {name: score(name) for name in (tiny_model.name, *speakers)}
    assert len(set(scores.values())) == 3
    # Both of the engine's slots are taken now, and the base must still be itself.
    assert scores == {name: score(name) for name in scores}


def test_a_batch_of_several_adapters_answers_as_each_alone(stack: Stack, speakers, tiny_model):
    names = [tiny_model.name, *speakers] * 4
    alone = {name: stack.ask(name).json()["choices"][0]["message"]["content"] for name in set(names)}
    with ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(lambda name: stack.ask(name).json()["choices"][0]["message"]["content"], names))
    assert together == [alone[name] for name in names]


def test_models_lists_base_alias_and_versions(stack: Stack, speakers, tiny_model):
    client = openai.OpenAI(base_url=stack.endpoint, api_key="none")
    assert {tiny_model.name, "speaker", *speakers} <= {model.id for model in client.models.list()}


def test_the_official_client_streams(stack: Stack, speakers):
    first, _ = speakers
    client = openai.OpenAI(base_url=stack.endpoint, api_key="none")
    messages = [{"role": "user", "content": "What is number 3?"}]
    stream = client.chat.completions.create(model=first, messages=messages, max_tokens=6, stream=True, temperature=0)
    chunks = list(stream)
    assert len(chunks) > 2
    assert {chunk.model for chunk in chunks} == {first}


@pytest.mark.parametrize("name", ["speaker:99", "nobody", "../../etc/passwd", "speaker:0", "speaker:1/../2", "x" * 5000])
def test_an_unknown_name_is_404_in_openais_shape(stack: Stack, served, name):
    client = openai.OpenAI(base_url=stack.endpoint, api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError) as refusal:
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hi"}])
    assert refusal.value.body["param"] == "model"


def test_a_broken_adapter_is_4xx_with_its_reason_and_the_rest_goes_on(stack: Stack, speakers, tmp_path):
    import json
    from dataclasses import fields

    from cluster.registry import Manifest

    first, _ = speakers
    folder = stack.registry.download(stack.registry.find(first))
    values = json.loads((folder / "manifest.json").read_text())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    manifest = Manifest(**{field.name: values[field.name] for field in fields(Manifest)})
    broken = stack.registry.register(manifest, tmp_path)
    answer = stack.ask(broken.name)
    assert answer.status_code == 400
    assert "cannot be read" in answer.json()["error"]["message"]
    assert stack.ask(first).status_code == 200


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/metrics", "/docs", "/redoc", "/sleep"])
def test_routes_that_are_not_meant_are_closed(stack: Stack, served, path):
    url = stack.endpoint.removesuffix("/v1") + path
    assert httpx.post(url, json={}).status_code == 404
    assert httpx.get(url).status_code == 404


def test_bad_requests_are_4xx(stack: Stack, speakers):
    first, _ = speakers
    assert httpx.post(f"{stack.endpoint}/chat/completions", content=b"{").status_code == 400
    assert stack.ask(first, max_tokens=-1).status_code == 400
    assert stack.ask(first, "word " * 2000).status_code == 400


def test_serving_again_changes_nothing(stack: Stack, config, served):
    before = engine_pids(stack)
    assert before
    assert stack.run("serve", str(config)).returncode == 0
    assert engine_pids(stack) == before


def test_status_shows_the_engine_and_the_versions(stack: Stack, speakers):
    first, _ = speakers
    shown = stack.run("serve", "status").stdout
    assert "RUNNING" in shown
    assert first in shown


def test_a_chat_port_that_is_taken_is_refused(stack: Stack, config, speakers):
    first, _ = speakers
    elsewhere = f"serve.port={stack.ports['mlflow_port']}"
    done = stack.run("serve", str(config), elsewhere)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert stack.ask(first).status_code == 200


def test_from_the_first_key_on_a_request_must_show_one(stack: Stack, speakers, tiny_model):
    """The last test here: an endpoint that once had a key stays shut."""

    first, _ = speakers

    def names(secret: str) -> set[str]:
        return {model.id for model in openai.OpenAI(base_url=stack.endpoint, api_key=secret, max_retries=0).models.list()}

    made = stack.run("serve", "keys", "create", "alice", "--models", "speaker")
    assert made.returncode == 0
    secret = made.stdout.split()[1]
    assert {"speaker", *speakers} <= names(secret)
    assert tiny_model.name not in names(secret)
    assert stack.ask(first).status_code == 401
    client = openai.OpenAI(base_url=stack.endpoint, api_key=secret, max_retries=0)
    answer = client.chat.completions.create(model=first, messages=[{"role": "user", "content": "Hi"}], max_tokens=4)
    assert answer.model == first
    assert stack.run("serve", "keys", "revoke", "alice").returncode == 0
    time.sleep(LOOK_EVERY_S)
    with pytest.raises(openai.AuthenticationError):
        names(secret)
