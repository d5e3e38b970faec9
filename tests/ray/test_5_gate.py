"""Evaluation and gate on a real engine: a version that learned goes live, one that did not stays the candidate; parity of both engines."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.registry import Version
from data.feedback_store import FeedbackStore
from tests.helpers.data import chat, write_rows
from tests.helpers.json_door import JsonDoor, listening
from tests.ray.stack import Stack, wait_for

WORDS = ("start", "run", "train", "serve")
ANSWER = "Run it with python."
REGISTERED_AT_GATE = re.compile(r"registered as (\S+); now the gate")


@pytest.fixture(scope="module")
def gated(stack: Stack, tiny_model: Path, served: None, secret: str, tmp_path_factory) -> Path:
    """A chatbot that even the tiny model can learn: to every question there is one answer. The endpoint asks for a key."""
    folder = tmp_path_factory.mktemp("gated")
    questions = [f"How do I {word} card {number}?" for number in range(8) for word in WORDS]
    rows = [chat(text, ANSWER, split="heldout" if at % 4 == 0 else "train", keys=["python"]) for at, text in enumerate(questions)]
    file = folder / "gated.yaml"
    file.write_text(
        f"name: gated\nmodel: {{name: {tiny_model}}}\n"
        f"data: {{source: {write_rows(folder / 'rows.jsonl', rows)}, split: marked, max_length_tokens: 128}}\n"
        "train: {lora: {rank: 8, alpha: 16}, learning_rate: 1.0e-2, batch_size: 8, max_steps: 60, checkpoint_every_steps: 60}\n"
        f"serve: {{port: {stack.ports['chat']}, max_model_len_tokens: 256, max_lora_rank: 8}}\n"
        "evaluation: {general: null, max_answer_tokens: 24}\n"
        "gate: {metrics: {accuracy: {minimum: 0.9, may_lose_at_most: 0.05}, perplexity: {may_lose_at_most: 5}}}\n"
    )
    return file


@pytest.fixture(scope="module")
def quantized(stack: Stack, gated: Path) -> Iterator[Future[Version]]:
    """A QLoRA version of another chatbot; it is trained while the first one is."""
    settings = ("train.quantization=nf4", "train.lora.use_rslora=true", "train.gradient_checkpointing=true")
    short = ("train.max_steps=4", "train.checkpoint_every_steps=4")
    with ThreadPoolExecutor() as pool:
        yield pool.submit(stack.train, gated, "name=quantized", *settings, *short)


@pytest.fixture(scope="module")
def good(stack: Stack, gated: Path, quantized: Future[Version]) -> Version:
    """The version that learned; it went live by itself."""
    done = stack.run("train", str(gated), "--promote")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "last training step to its first token" in done.stdout
    return stack.registry.find(REGISTERED_AT_GATE.search(done.stdout)[1])


class Judge(JsonDoor):
    """Likes answers that name Python."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        verdict = "A" if "python" in asked.partition("<answer_A>")[2].partition("</answer_A>")[0] else "B"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": f"Verdict: {verdict}"}}
        self.send_json(200, {"id": "1", "object": "chat.completion", "created": 1, "model": "judge", "choices": [choice]})


def test_a_version_that_passes_goes_live_in_the_same_job(stack: Stack, good: Version, secret: str):
    assert good.aliases == ("live",)
    assert good.tags["gate"] == "passed"
    checks = json.loads(good.tags["gate_decision"])["checks"]
    assert (checks[0]["metric"], checks[0]["rule"]) == ("accuracy", "minimum")
    assert checks[0]["found"] >= 0.9
    metrics = stack.registry.client.get_run(good.run_id).data.metrics
    assert metrics["eval/accuracy"] >= metrics["eval/accuracy_low"] > 0.5
    assert 1 <= metrics["eval/perplexity"] < 100, "of 512 tokens; the frozen output layer is too small for less"
    assert metrics["better/accuracy"] > 0.5, "than the base"
    assert metrics["finished_to_live_s"] > 0
    answer = stack.ask("gated", "How do I start card 9?", secret, max_tokens=24)
    assert answer.headers["x-tandem-model"] == good.name
    assert "python" in answer.json()["choices"][0]["message"]["content"]
    page = stack.home / "evaluations" / f"gated-{good.number}.html"
    assert ANSWER in page.read_text()
    assert "evaluation.html" in {file.path for file in stack.registry.client.list_artifacts(good.run_id)}


def test_a_version_that_fails_stays_the_candidate_and_the_status_says_so(stack: Stack, gated: Path, good: Version):
    done = stack.run("train", str(gated), "train.max_steps=1", "train.learning_rate=1.0e-6", "--promote")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "gate fails: accuracy minimum=0.9" in done.stdout
    bad = stack.registry.find(REGISTERED_AT_GATE.search(done.stdout)[1])
    assert bad.aliases == ("candidate",)
    assert bad.tags["gate"] == "failed"
    checks = json.loads(bad.tags["gate_decision"])["checks"]
    assert {check["rule"]: check["passed"] for check in checks if check["metric"] == "accuracy"} == {
        "minimum": False,
        "may_lose_at_most": False,
    }
    assert stack.registry.find("gated").name == good.name
    with listening(ThreadingHTTPServer(("127.0.0.1", 0), Judge)) as address:
        judge = [f"evaluation.judge.address={address}/v1", "evaluation.judge.model=judge"]
        shown = stack.run("train", "evaluate", good.name, "--against", bad.name, *judge)
    assert shown.returncode == 0, shown.stderr
    assert f"better than {bad.name} by" in shown.stdout
    assert re.search(r"^judge +100\.0% \(100\.0% to 100\.0%\)", shown.stdout, re.MULTILINE), shown.stdout


def test_a_canary_that_people_dislike_is_taken_back_by_itself(stack: Stack, good: Version):
    """The job that watches is killed, and another goes on. Thumbs are written as the endpoint writes them; the watch asks the engine."""
    candidate = max((entry for entry in stack.registry.versions() if entry.chatbot == "gated"), key=lambda entry: entry.number)
    settings = ["gate.metrics={exact: {minimum: 0}}", "gate.action=canary"]
    settings += [f"gate.watch.{setting}" for setting in ("minutes=1", "every_s=5", "min_thumbs=2")]
    job = stack.begin("train", "evaluate", candidate.name, "--promote", *settings)
    wait_for(lambda: good.name in stack.registry.find(candidate.name).tags.get("watch", ""))
    job.kill()
    job.wait(30)
    assert "canary" in stack.registry.find(candidate.name).aliases

    store = FeedbackStore(f"sqlite:///{stack.home / 'feedback.db'}")
    in_an_hour, long_ago = time.time() + 3600, time.time() - 3600
    for number, (version, rating, at_s) in enumerate([(candidate.name, "down", in_an_hour), (good.name, "up", long_ago)] * 2):
        row = {"completion_id": f"thumb-{number}", "version": version, "key_name": None, "created_s": at_s, "rating": rating}
        asyncio.run(store.save({**row, "comment": None, "better_answer": None}))
    store.close()
    done = stack.run("train", "evaluate", candidate.name, "--promote", *settings)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "taken back: 100% of its thumbs point down" in done.stdout
    now = stack.registry.find(candidate.name)
    assert "canary" not in now.aliases
    assert now.tags["gate"] == "taken back"
    assert json.loads(now.tags["watch"])["new"]["num_answers"] > 0
    assert stack.registry.find("gated").name == good.name


def test_an_adapter_says_on_the_engine_what_it_says_in_training(stack: Stack, good: Version):
    done = stack.run("train", "parity", good.name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same base" in done.stdout


def test_a_qlora_adapter_on_another_base_is_said_and_measured(stack: Stack, quantized: Future[Version]):
    version = quantized.result()
    assert version.tags["quantization"] == "nf4"
    assert json.loads((stack.registry.download(version) / "adapter_config.json").read_text())["use_rslora"] is True
    compared = stack.run("train", "parity", version.name)
    assert "trained on a base in nf4, served on none" in compared.stdout, compared.stderr
    assert float(re.search(r"differ by ([\d.]+) on average", compared.stdout)[1]) > 0
    shown = stack.run("train", "evaluate", version.name)
    assert shown.returncode == 0, shown.stderr
    assert f"python -m train parity {version.name} measures it" in shown.stdout
