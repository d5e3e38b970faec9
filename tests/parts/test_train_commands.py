"""What `python -m train` and `python -m tune` refuse by the registry alone, on a real MLflow store; no cluster is needed."""

from pathlib import Path

import pytest

from cluster.processes import free_port
from cluster.registry import Version
from configs.loader import load_chatbot
from data.prepare import Prepared
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
    record = Record.begin(registry.client, load_chatbot(bot), DATA, "0" * 16, kind)
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
