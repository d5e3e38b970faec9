"""What a run's record tells: every setting, fingerprints that change when they should, and the commit."""

import json
import os
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from cluster.home import log_folder
from cluster.logs import TRAINING, stream_file
from cluster.registry import Registry
from cluster.versions import git_commit
from configs.errors import RegistryError, RunError
from configs.loader import load_chatbot, setting_paths
from configs.schema import ChatbotConfig, SweepConfig
from data.prepare import Prepared, prepare
from tests.helpers.data import chat, tokenizer_folder, write_rows
from train import driver
from train.driver import ASKED, Start, on_record
from train.record import FAILED, FINISHED, RUN, STOPPED, SWEEP, Record, _experiment_id, config_fingerprint, flat_settings
from tune.record import trial_run

GROUPS = {"model", "data", "train", "train.lora", "tune", "tune.budget", "serve", "serve.scaling", "serve.feedback"}
GROUPS |= {"evaluation", "evaluation.judge", "gate", "gate.watch"}
LEAVES = [path for path, _ in setting_paths(ChatbotConfig) if path not in GROUPS]


def write_bot(folder: Path) -> Path:
    rows = [chat(f"How do I start {number}?", f"Run it {number}.") for number in range(5)]
    (folder / "bot.yaml").write_text(f"name: bot\ndata:\n  source: {write_rows(folder / 'chats.jsonl', rows)}\n")
    return folder / "bot.yaml"


@pytest.fixture
def config(home, tmp_path) -> ChatbotConfig:
    return load_chatbot(write_bot(tmp_path))


def begun(client: Any, config: ChatbotConfig, *facts: Any) -> Record:
    record = Record.create(client, config.name)
    record.describe(config, *facts)
    return record


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TANDEM_HOME", str(folder / "home"))
        return prepare(load_chatbot(write_bot(folder)), tokenizer_folder())


def changed(config: Any, path: str) -> Any:
    """Return the config with another value at `path`; whether the whole could be trained does not matter here."""
    first, _, rest = path.partition(".")
    old = getattr(config, first)
    if rest:
        return config.model_copy(update={first: changed(old, rest)})
    new = not old if isinstance(old, bool) else old + 1 if isinstance(old, int | float) else f"{old}x" if isinstance(old, str) else ["x"]
    return config.model_copy(update={first: new})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # values of another kind are meant
@pytest.mark.parametrize("path", LEAVES)
def test_the_fingerprint_changes_with_every_setting_that_training_knows(path, config):
    same = config_fingerprint(config) == config_fingerprint(changed(config, path))
    assert same == path.startswith(("serve.", "tune.", "evaluation.", "gate."))


def test_the_fingerprint_is_that_of_what_was_meant_not_of_how_it_was_written(config, tmp_path):
    spelt_out = load_chatbot(tmp_path / "bot.yaml", ["train.lora.rank=16", "train.learning_rate=2e-4"])
    assert config_fingerprint(spelt_out) == config_fingerprint(config)
    assert len(config_fingerprint(config)) == 16


def test_every_setting_is_recorded_by_its_dotted_path(config):
    flat = dict(flat_settings(config))
    assert list(flat) == LEAVES
    assert (flat["train.lora.rank"], flat["train.max_steps"], flat["train.lora.modules_to_save"]) == ("16", "None", "[]")
    assert GROUPS.isdisjoint(flat)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.setenv("TANDEM_CHECKOUT", str(folder))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    return folder


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_checkout_and_marked_where_files_differ(checkout):
    assert git_commit() == "unknown", "outside git"
    git(checkout, "init", "-q")
    assert git_commit() == "unknown", "before the first commit"
    (checkout / "code.py").write_text("1\n")
    git(checkout, "add", "code.py")
    git(checkout, "commit", "-q", "-m", "first")
    commit = git(checkout, "rev-parse", "HEAD")
    assert git_commit() == commit
    (checkout / "notes.txt").write_text("not tracked")
    assert git_commit() == commit
    (checkout / "code.py").write_text("2\n")
    assert git_commit() == f"{commit}-changed"


def test_without_git_the_commit_is_unknown(checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    assert git_commit() == "unknown"


@pytest.fixture
def client(registry, config, tmp_path) -> Any:
    registry.client.create_experiment(config.name, artifact_location=str(tmp_path / "artifacts"))
    return registry.client


def test_a_run_begins_with_all_that_went_in(client, config, data):
    record = begun(client, config, data, "f" * 16)
    run = client.get_run(record.run_id)
    assert run.info.status == "RUNNING"
    assert set(LEAVES) <= set(run.data.params)
    assert run.data.params["train.lora.rank"] == "16"
    assert run.data.params["data.num_train"] == str(data.num_train)
    assert run.data.tags["config_fingerprint"] == config_fingerprint(config)
    assert (run.data.tags["data_fingerprint"], run.data.tags["base_fingerprint"]) == (data.fingerprint, "f" * 16)
    assert {file.path for file in client.list_artifacts(record.run_id)} == {"config.json", "environment.txt"}


def test_a_run_that_is_asked_to_stop_as_it_begins_says_so_and_cannot_be_resumed(registry, client, config, data, monkeypatch, tmp_path):
    monkeypatch.setattr(driver, "connect", lambda session: nullcontext())  # no cluster is needed until a run is described
    monkeypatch.setattr(driver, "require_cards", lambda num_cards: None)
    monkeypatch.setattr("train.record.git_commit", lambda: os.kill(os.getpid(), signal.SIGTERM))
    start = Start(None, registry, config, tmp_path, data, "f" * 16)
    with pytest.raises(KeyboardInterrupt), on_record(start, 1):
        pytest.fail("it trains")
    (run,) = client.search_runs([client.get_experiment_by_name(config.name).experiment_id])
    assert (run.info.status, run.data.tags["reason"]) == (STOPPED, ASKED)
    with pytest.raises(RunError, match="stopped as it began"):
        Record.find(client, run.info.run_id)


def test_first_runs_that_begin_at_once_are_of_one_experiment(registry):
    at_once = Barrier(4)

    def begin(_: int) -> str:
        at_once.wait()
        return _experiment_id(registry.client, "new")

    registry.client.search_experiments()  # the store is open
    with ThreadPoolExecutor(at_once.parties) as pool:
        assert len(set(pool.map(begin, range(at_once.parties)))) == 1


def test_the_log_says_how_a_run_began_and_ended(client, config, data):
    record = begun(client, config, data, "f" * 16)
    record.end(FAILED, "no memory")
    record.reopen()
    record.end(FINISHED)
    told = [json.loads(line) for line in stream_file(log_folder(), TRAINING).read_text().splitlines()]
    assert {line["run"] for line in told} == {record.run_id}
    assert [(line["event"], line["level"], line.get("status")) for line in told] == [
        ("begun", "info", None),
        ("ended", "error", FAILED),
        ("gone on with", "info", None),
        ("ended", "info", FINISHED),
    ]
    assert (told[0]["chatbot"], told[0]["kind"], told[1]["reason"]) == ("bot", RUN, "no memory")


def test_a_long_setting_does_not_stop_a_run(client, config, data, tmp_path):
    long = load_chatbot(tmp_path / "bot.yaml", [f"data.system_prompt={'x' * 10_000}"])
    record = begun(client, long, data, "f" * 16)
    assert Record.find(client, record.run_id)[1] == long


def test_a_run_goes_on_with_its_own_config_until_it_is_finished(client, config, data):
    record = begun(client, config, data, "f" * 16)
    for status in (STOPPED, FAILED):
        record.end(status, "the card was wanted " * 100)
        run = client.get_run(record.run_id)
        assert run.info.status == status
        assert run.data.tags["reason"].startswith("the card was wanted")
        record, found = Record.find(client, record.run_id)
        assert (record.run_id, found) == (run.info.run_id, config)
        assert client.get_run(record.run_id).info.status == status, "as long as it may yet be refused"
        record.reopen()
        assert client.get_run(record.run_id).info.status == "RUNNING"
    record.end(FINISHED)
    with pytest.raises(RunError, match=f"run {record.run_id} is finished"):
        Record.find(client, record.run_id)


def test_a_run_that_is_not_there_cannot_go_on(client):
    with pytest.raises(RunError, match="no run gone to resume"):
        Record.find(client, "gone")


def test_a_run_a_sweep_and_a_trial_are_told_apart(registry, client, config, data):
    """The config has a space to search, as every chatbot's may: only the record says whether it was searched."""
    config = config.model_copy(update={"tune": SweepConfig.model_validate({"space": {"train.lora.rank": {"choice": [4, 8]}}})})
    run, sweep = (begun(client, config, data, "f" * 16, kind).run_id for kind in (RUN, SWEEP))
    trial = trial_run(registry.url, sweep, "trial_00001", {"train.lora.rank": 4})
    assert Record.find(client, run)[0].run_id == run
    assert Record.find(client, sweep, SWEEP)[0].run_id == sweep
    with pytest.raises(RunError, match=f"(?s)is not a single run.*a sweep.*python -m tune CONFIG --resume {sweep}"):
        Record.find(client, sweep)
    with pytest.raises(RunError, match=f"(?s)is not a sweep.*a single run.*python -m train CONFIG --resume {run}"):
        Record.find(client, run, SWEEP)
    for kind in (RUN, SWEEP):
        with pytest.raises(RunError, match="it is a trial of a sweep"):
            Record.find(client, trial, kind)


def test_a_run_whose_own_config_can_no_longer_be_read_is_refused(client, config, data):
    record = begun(client, config, data, "f" * 16)
    client.log_text(record.run_id, json.dumps({"name": "bot", "no_longer": "a setting"}), "config.json")
    with pytest.raises(RunError, match=record.run_id):
        Record.find(client, record.run_id)


def test_a_run_goes_on_with_the_data_and_the_base_that_it_began_with(client, config, data):
    record = begun(client, config, data, "f" * 16)
    record.require_same(data, "f" * 16)
    with pytest.raises(RunError, match=f"(?s)base model changed.*{'f' * 16}.*{'0' * 16}.*--resume"):
        record.require_same(data, "0" * 16)
    with pytest.raises(RunError, match=f"(?s)its data changed.*{data.fingerprint}.*{'0' * 16}"):
        record.require_same(replace(data, fingerprint="0" * 16), "f" * 16)


def test_a_server_that_does_not_answer_is_an_error_with_a_remedy(config, data, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as held:  # bound, but nobody listens
        held.bind(("127.0.0.1", 0))
        away = Record(Registry(f"http://127.0.0.1:{held.getsockname()[1]}").client, "0" * 32)
        asks = [lambda: away.end(FAILED), away.reopen, lambda: away.attach("note.txt", "x"), lambda: Record.find(away.client, "gone")]
        asks += [lambda: begun(away.client, config, data, "f" * 16), lambda: away.require_same(data, "f" * 16)]
        for ask in asks:
            with pytest.raises(RegistryError, match="cluster status"):
                ask()


def test_overrides_do_not_go_with_resume(command, config, tmp_path):
    refused = command("train", str(tmp_path / "bot.yaml"), "train.num_epochs=9", "--resume", "0" * 32)
    assert (refused.status, refused.err.splitlines()[0]) == (2, "error: --resume takes no settings")
    assert "leave out train.num_epochs=9" in refused.err
