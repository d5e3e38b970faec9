"""The place that every machine reaches, through pyarrow's own file systems: a folder, and a URL."""

import os
import time
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from ray.train import Checkpoint

from cluster.processes import free_port
from cluster.storage import exists, get, has_any, mark, put, reaches
from configs.errors import ClusterError, DataError
from data.copies import drop_copy, fetch_data, has_copy, send_data
from tests.helpers.bucket import BUCKET, WHY_NONE, bucket_environment, has_bucket, own_bucket
from train.places import FETCHED_KEPT_S, has_checkpoint, on_disk, runs_place


@pytest.fixture(params=["folder", "url"])
def storage(request, tmp_path) -> str:
    folder = tmp_path / "shared" / "tandem"
    return str(folder) if request.param == "folder" else folder.as_uri()


def test_what_the_head_marked_is_reached_and_another_place_is_not(storage):
    assert not reaches(storage)
    mark(storage)
    assert reaches(storage)
    assert not reaches(f"{storage}-other")


def test_a_folder_goes_in_once_and_comes_out_as_it_was(storage, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "rows.jsonl").write_text("one\n")
    put(storage, source, "data/bot-1")
    (source / "deep" / "rows.jsonl").write_text("changed\n")
    put(storage, source, "data/bot-1")
    assert exists(storage, "data/bot-1/deep/rows.jsonl")
    target.mkdir()
    get(storage, "data/bot-1", target)
    assert (target / "deep" / "rows.jsonl").read_text() == "one\n"


def test_a_copy_that_was_cut_off_is_made_again(storage, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_text("1")
    put(storage, source, "data/bot-1")
    (tmp_path / "shared" / "tandem" / "data" / "bot-1" / ".tandem-storage").unlink()
    (tmp_path / "shared" / "tandem" / "data" / "bot-1" / "a").unlink()
    put(storage, source, "data/bot-1")
    assert exists(storage, "data/bot-1/a")


def test_a_place_that_nobody_knows_is_refused(tmp_path):
    with pytest.raises(ClusterError, match="no place that pyarrow knows"):
        mark("nowhere://bucket/tandem")
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match="cannot be written to"):
        mark(str(tmp_path / "file" / "below"))


def test_a_run_has_a_checkpoint_once_it_saved_one(home, storage, tmp_path):
    assert not has_checkpoint(storage, "run")
    run = tmp_path / "shared" / "tandem" / "runs" / "run"
    run.mkdir(parents=True)
    (run / "checkpoint_manager_snapshot.json").write_text("{}")
    assert not has_checkpoint(storage, "run"), "Ray keeps a file of that name beside them"
    (run / "checkpoint_2026").mkdir()
    assert has_checkpoint(storage, "run")
    assert not has_any(storage, "runs/none", "")


@pytest.mark.skipif(not has_bucket(), reason=WHY_NONE)
def test_a_bucket_is_a_place_as_well(home, tmp_path, monkeypatch):
    source = tmp_path / "head" / "bot-1"
    source.mkdir(parents=True)
    (source / "train.jsonl").write_text("{}\n")
    port = free_port()
    for name, value in bucket_environment("127.0.0.1", port).items():
        monkeypatch.setenv(name, value)
    with own_bucket("127.0.0.1", port):
        with pytest.raises(ClusterError, match="cannot be written to"):
            mark("s3://no-such-bucket/tandem")
        assert not reaches(BUCKET)
        mark(BUCKET)
        assert reaches(BUCKET)
        send_data(BUCKET, source)
        assert (fetch_data(BUCKET, "bot-1") / "train.jsonl").read_text() == "{}\n"
        assert has_copy(BUCKET, "bot-1")
        drop_copy(BUCKET, "bot-1")
        assert not has_copy(BUCKET, "bot-1")
        assert not has_checkpoint(BUCKET, "run")
        put(BUCKET, source, "runs/run/checkpoint_1")
        assert has_checkpoint(BUCKET, "run")


def test_without_storage_runs_lie_in_the_home_folder(home):
    assert runs_place("") == str(home / "runs")
    (home / "runs" / "run" / "checkpoint_1").mkdir(parents=True)
    assert has_checkpoint("", "run")


def test_another_machine_fetches_a_runs_data_once(home, storage, tmp_path):
    source = tmp_path / "head" / "bot-1"
    source.mkdir(parents=True)
    (source / "train.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="bot-1 is not on this machine"):
        fetch_data(storage, "bot-1")
    send_data(storage, source)
    fetched = fetch_data(storage, "bot-1")
    assert fetched == home / "data" / "bot-1"
    assert (fetched / "train.jsonl").read_text() == "{}\n"
    assert fetch_data("", "bot-1") == fetched


def test_a_checkpoint_behind_a_url_is_fetched_and_those_of_another_day_are_gone(home, tmp_path):
    bucket = tmp_path / "bucket"
    for name in ("run/checkpoint_1", "run/checkpoint_2", "other/checkpoint_1"):
        (bucket / name).mkdir(parents=True)
        (bucket / name / "adapter_config.json").write_text(name)

    def fetch(name: str) -> Path:
        return on_disk(Checkpoint(name, SubTreeFileSystem(str(bucket), LocalFileSystem())))

    first, second = fetch("run/checkpoint_1"), fetch("run/checkpoint_2")
    assert (first.parent, first.name) == (home / "fetched", "run-checkpoint_1")
    assert (second / "adapter_config.json").read_text() == "run/checkpoint_2"
    for folder in (first, second):
        os.utime(folder, (0, time.time() - FETCHED_KEPT_S - 60))
    assert fetch("run/checkpoint_1") == first, "a run that goes on fetches its own again"
    other = fetch("other/checkpoint_1")
    assert sorted(folder.name for folder in (home / "fetched").iterdir()) == sorted((first.name, other.name))
    assert (first / "adapter_config.json").read_text() == "run/checkpoint_1"


def test_a_storage_that_does_not_answer_is_told_and_hides_no_other_failure(storage, tmp_path):
    mark(storage)
    for name in ("data", "runs"):
        (tmp_path / "shared" / "tandem" / name).mkdir()
        (tmp_path / "shared" / "tandem" / name / "bot-1").write_text("no folder")
    (tmp_path / "source").mkdir()
    with pytest.raises(ClusterError, match="does not answer"):
        put(storage, tmp_path / "source", "data/bot-1")
    assert has_checkpoint(storage, "bot-1")
