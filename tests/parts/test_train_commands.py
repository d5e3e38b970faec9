"""What `python -m train` and `python -m tune` find out before anything trains, on a real MLflow store; no cluster is needed."""

import shutil
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.processes import free_port
from cluster.registry import Version
from configs.errors import DataError, RunError
from configs.loader import load_chatbot
from data.prepare import Prepared
from tests.helpers.data import chat, tokenizer_folder, write_rows
from tests.helpers.json_door import JsonDoor, listening
from train.driver import make_ready
from train.evaluate import require_measurable
from train.record import CONFIG_FILE, FAILED, FINISHED, RUN, SWEEP, Record

DATA = Prepared(Path(), 56, 8, 560, 112, 0, 0, 0, 0, 0, 10, 5, "0" * 16)


@pytest.fixture
def bot(home, up, registry, tmp_path) -> Path:
    """A chatbot's file; its config has a space, for the day that it is searched."""
    up(mlflow_url=registry.url)
    (tmp_path / "rows.jsonl").touch()
    file = tmp_path / "gated.yaml"
    file.write_text("name: gated\ndata: {source: rows.jsonl}\ntune: {space: {train.lora.rank: {choice: [1, 2]}}}\n")
    return file


@pytest.fixture
def good(bot, registry, register) -> Version:
    """A version with its config, which is live."""
    version = register("gated")
    Record(registry.client, version.run_id).attach(CONFIG_FILE, load_chatbot(bot).model_dump_json())
    return registry.promote(version.name)


@pytest.mark.parametrize(
    ("module", "kind", "status", "says"),
    [
        ("train", RUN, FINISHED, "is finished"),
        ("tune", SWEEP, FINISHED, "is finished"),
        ("tune", RUN, FAILED, "is not a sweep"),
        ("train", SWEEP, FAILED, "is not a single run"),
    ],
)
def test_what_is_finished_or_of_another_kind_is_not_resumed(module, kind, status, says, bot, command, registry):
    record = Record.create(registry.client, "bot")
    record.describe(load_chatbot(bot), DATA, "0" * 16, kind)
    record.end(status)
    done = command(module, str(bot), "--resume", record.run_id)
    assert done.status == 2, done.out
    assert says in done.err
    assert registry.client.get_run(record.run_id).info.status == status, "as before"


def test_what_is_not_there_is_one_clear_error(bot, good, command):
    nobody = free_port()
    for words, says in (
        (["evaluate", "gated:99"], "gated has no version 99"),
        (["evaluate", good.name, "--against", "live"], "cannot be compared with itself"),
        (["evaluate", good.name, f"serve.port={nobody}"], f"no answer from http://127.0.0.1:{nobody}/v1"),
        ([str(bot), f"serve.port={nobody}", "--promote"], f"no answer from http://127.0.0.1:{nobody}/v1"),
    ):
        done = command("train", *words)
        assert done.status == 2
        assert says in done.err


@pytest.fixture
def ready(bot, tmp_path) -> Path:
    """The chatbot with rows, without keys, and a model of which only the tokenizer is read."""
    shutil.copytree(tokenizer_folder(), tmp_path / "tiny")
    (tmp_path / "tiny" / "config.json").write_text('{"model_type": "unknown"}')
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"")
    rows = [chat(f"How do I start {number}?", f"Run it {number}.") for number in range(10)]
    write_rows(tmp_path / "rows.jsonl", [*rows, chat("Hi", "long " * 200)])
    bot.write_text(f"{bot.read_text()}model: {{name: {tmp_path / 'tiny'}}}\n")
    return bot


@pytest.fixture
def port() -> Iterator[str]:
    """Of an endpoint that serves the chatbot's base, and nothing else."""

    class Door(JsonDoor):
        def do_GET(self) -> None:
            model = {"id": "tiny", "object": "model", "created": 1, "owned_by": "tandem"}
            self.send_json(200, {"object": "list", "data": [model]})

    with listening(ThreadingHTTPServer(("127.0.0.1", 0), Door)) as address:
        yield address.rpartition(":")[2]


def test_a_rule_on_what_cannot_be_measured_is_refused_before_the_training(ready, port, command, registry):
    done = command("train", str(ready), f"serve.port={port}", "gate.metrics.accuracy.minimum=0.5", "--promote")
    assert done.status == 2
    assert "the gate's rule on accuracy cannot be checked" in done.err
    assert "none of the 1 held-out rows that are asked has any" in done.err
    assert "Traceback" not in done.err
    assert not registry.client.search_runs([experiment.experiment_id for experiment in registry.client.search_experiments()])


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        (["evaluation.judge={address: 'http://127.0.0.1:9', model: m, rubric: none.md}"], DataError, "cannot read the rubric none.md"),
        (["evaluation.general=rows.jsonl"], DataError, "has questions without keys"),
        (["evaluation.lm_eval_tasks=[none.yaml]"], (DataError, RunError), "lm-eval is not installed|no task file none.yaml"),
    ],
)
def test_what_an_evaluation_would_fail_at_is_found_before_the_training(settings, error, says, ready):
    with pytest.raises(error, match=says):
        require_measurable(load_chatbot(ready, settings))


def test_rules_that_can_be_measured_are_let_pass(ready, tmp_path):
    rows = [chat(f"How do I start {number}?", f"Run it {number}.", keys=["run"]) for number in range(10)]
    require_measurable(load_chatbot(ready, ["gate.metrics.exact.minimum=0.5"]))
    write_rows(tmp_path / "rows.jsonl", rows)
    require_measurable(load_chatbot(ready, ["gate.metrics.accuracy.minimum=0.5"]))


def test_rows_over_the_longest_length_are_told_before_the_training(ready):
    said: list[str] = []
    make_ready(load_chatbot(ready, ["data.max_length_tokens=120", "data.heldout_share=0.5"]), said.append)
    (warning,) = [words for words in said if "warning" in words]
    assert "1 of 11 conversations are over data.max_length_tokens=120: 1 dropped; the longest has" in warning
