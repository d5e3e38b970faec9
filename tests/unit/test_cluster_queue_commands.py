"""`python -m cluster submit|queue|cancel|move` without a cluster: what is kept, what is shown, what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cluster.cards import Card, Gpu
from cluster.job_queue import Queue, QueuedJob
from cluster.queue_view import check_job
from configs.cli import JOB_VARIABLE
from configs.errors import EXIT_NO_FIT, EXIT_UNAVAILABLE, ClusterError
from configs.loader import ROOT

HELPDESK = str(ROOT / "configs" / "helpdesk.yaml")


def only_job() -> QueuedJob:
    with Queue() as queue:
        (job,) = queue.jobs()
    return job


def test_what_is_submitted_is_kept_with_its_settings_and_is_a_config_by_itself(command, tmp_path):
    done = command("cluster", "submit", HELPDESK, "train.max_steps=3", "name=other", "--priority", "2", "--memory-gib", "20")
    assert done.status == 0, done.err
    assert "job 1, train of other; it waits for: python -m cluster up" in done.out
    job = only_job()
    assert (job.kind, job.priority, job.memory_gib, job.folder, job.num_cards) == ("train", 2, 20, str(tmp_path), 1)
    (tmp_path / "job.yaml").write_text(job.config)
    assert yaml.safe_load(job.config)["train"]["max_steps"] == 3
    assert command("configs", "check", str(tmp_path / "job.yaml")).status == 0


@pytest.fixture
def large(tmp_path) -> Path:
    """The folder of a base with 8 billion weights, without them."""
    (tmp_path / "config.json").write_text((ROOT / "configs" / "shapes" / "llama3_8b.json").read_text())
    (tmp_path / "model.safetensors").touch()
    return tmp_path


def test_what_fits_no_card_is_refused_with_what_would(command, up, large):
    up()
    done = command("cluster", "submit", HELPDESK, f"model.name={large}")
    assert done.status == 2
    assert "this run does not fit its card" in done.err
    with Queue() as line:
        assert line.jobs() == []


@pytest.mark.parametrize(
    "words",
    [
        ("cluster", "submit", HELPDESK, "train.precision=fp8"),
        ("cluster", "submit", "--sweep", HELPDESK, "tune.space={train.precision: {choice: [auto, fp8]}}"),
        ("train", HELPDESK, f"data.source={ROOT / 'data' / 'helpdesk.jsonl'}", "train.precision=fp8"),
    ],
    ids=["submitted", "a sweep", "not by the queue"],
)
def test_fp8_is_refused_at_once_where_no_card_has_it(command, up, words):
    up()
    done = command(*words)
    assert done.status == 2
    for told in ("train.precision=fp8 wants GPUs that multiply in FP8", "card1 (cpu) is none", "train.precision=auto"):
        assert told in done.err
    with Queue() as line:
        assert line.jobs() == []


def test_fp8_is_refused_where_any_card_that_the_job_may_get_has_none(up, large):
    old = Card("card0", "serve", 8, 8, Gpu("0", "NVIDIA GeForce RTX 2080", 8, 8, "580", 7.5))
    new = Card("card1", "train", 8, 79, Gpu("1", "NVIDIA H100 80GB HBM3", 79, 79, "580", 9.0))
    session = replace(up(), cards=(old.labels, new.labels))
    lends = replace(session, machine={"lending": {"enabled": True}})
    in_fp8 = "train.precision=fp8"
    assert check_job(HELPDESK, [in_fp8], False, session).memory_gib == 79, "chat's card is not lent"
    with pytest.raises(ClusterError, match=r"card0 .* is none"):
        check_job(HELPDESK, [in_fp8], False, lends)
    assert check_job(HELPDESK, [in_fp8, f"model.name={large}"], False, lends).memory_gib == 79, "it is too small for this one"


def test_a_job_knows_the_smallest_card_that_will_do(command, up):
    up()
    assert command("cluster", "submit", HELPDESK).status == 0
    assert only_job().memory_gib == 8


def test_the_line_is_shown_moved_and_left(command):
    assert "no jobs" in command("cluster", "queue").out
    for words in ((), ("--priority", "1"), ("--sweep",)):
        assert command("cluster", "submit", HELPDESK, *words).status == 0
    assert numbers(command("cluster", "queue").out) == ["2", "1", "3"]
    assert command("cluster", "move", "1", "--before", "2").status == 0
    assert numbers(command("cluster", "queue").out) == ["1", "2", "3"]
    assert "priority -1" in command("cluster", "move", "1", "--priority", "-1").out
    assert "cancelled" in command("cluster", "cancel", "2").out
    assert numbers(command("cluster", "queue").out) == ["1", "3", "2"], "what ended is at the end"


def numbers(shown: str) -> list[str]:
    return [line.split()[0] for line in shown.splitlines()[1:]]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("submit", "nothing.yaml"), "no config file nothing.yaml"),
        (("submit", HELPDESK, "train.max_step=3"), "did you mean train.max_steps?"),
        (("submit", "--sweep", HELPDESK, "tune.space={}"), "tune.space"),
        (("submit", HELPDESK, "train.num_workers=2", "train.batch_size=4"), "the cluster has 1 that training may use"),
        (("cancel", "9"), "there is no job 9"),
        (("move", "9", "--priority", "1"), "there is no job 9"),
        (("move", "1"), "one of --priority and --before is wanted"),
    ],
)
def test_what_cannot_be_is_one_clear_error(command, up, words, told):
    up()
    done = command("cluster", *words)
    assert done.status == 2
    assert told in done.err
    assert "Traceback" not in done.err


def test_a_job_whose_cluster_is_away_is_begun_again_and_what_is_wrong_is_not(command, monkeypatch):
    assert command("train", HELPDESK).status == 2
    monkeypatch.setenv(JOB_VARIABLE, "1")
    assert command("train", HELPDESK).status == EXIT_UNAVAILABLE
    assert command("train", HELPDESK, "train.max_step=3").status == 2


def test_a_job_that_does_not_fit_its_card_tells_it_apart_from_what_is_wrong(command, up, large, monkeypatch):
    up()
    words = ("train", HELPDESK, f"model.name={large}", f"data.source={ROOT / 'data' / 'helpdesk.jsonl'}")
    assert command(*words).status == 2
    monkeypatch.setenv(JOB_VARIABLE, "1")
    done = command(*words)
    assert (done.status, "this run does not fit its card" in done.err) == (EXIT_NO_FIT, True)
