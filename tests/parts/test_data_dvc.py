"""The data's version: our own hash of a file or folder against DVC's, and `dvc repro` of our own `dvc.yaml` by the real DVC."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs.loader import ROOT
from data.sources import dvc_hash, known_to_dvc
from tests.helpers.data import chat, tokenizer_folder, write_rows

needs_dvc = pytest.mark.skipif(shutil.which("dvc") is None, reason="DVC is not installed: uv tool install dvc")


@pytest.fixture
def repository(home, tmp_path) -> Path:
    """A repository with our `dvc.yaml`, a small chatbot as the helpdesk, and a base model of which only the tokenizer is read."""
    folder = tmp_path / "checkout"
    (folder / "configs").mkdir(parents=True)
    (folder / "data").mkdir()
    shutil.copy(ROOT / "dvc.yaml", folder)
    (folder / "configs" / "helpdesk.yaml").write_text("name: helpdesk\ndata: {source: data/helpdesk.jsonl}\n")
    write_rows(folder / "data" / "helpdesk.jsonl", [chat(f"Question {at}?", f"Answer {at}.") for at in range(10)])
    shutil.copytree(tokenizer_folder(), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model" / "model.safetensors").touch()
    return folder


def init(folder: Path) -> None:
    for words in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "config", "core.analytics", "false"]):
        subprocess.run(words, cwd=folder, check=True, capture_output=True)


def repro(folder: Path) -> str:
    venv = str(Path(sys.executable).parent)
    path = {"PATH": f"{venv}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "BASE_MODEL_NAME": str(folder.parent / "model")}
    done = subprocess.run(
        ["dvc", "repro"], cwd=folder, env={**os.environ, **path}, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def recorded(folder: Path) -> dict[str, str]:
    (stage,) = yaml.safe_load((folder / "dvc.lock").read_text())["stages"].values()
    return {entry["path"]: entry["md5"] for entry in (*stage["deps"], *stage["outs"])}


@needs_dvc
def test_repro_makes_the_processed_data_from_the_raw(repository):
    init(repository)
    raw, made = repository / "data" / "helpdesk.jsonl", repository / "data" / "prepared" / "helpdesk"
    repro(repository)
    report = json.loads((made / "report.json").read_text())
    first = recorded(repository)
    assert (report["num_train"], report["num_heldout"]) == (9, 1)
    assert report["sources"] == {"data/helpdesk.jsonl": first["data/helpdesk.jsonl"]}, "a manifest names what dvc.lock names"
    assert dvc_hash(made) == first["data/prepared/helpdesk"], "a folder's too"
    assert known_to_dvc(repository, dvc_hash(raw)) == ["data/helpdesk.jsonl"]
    shutil.rmtree(made)
    repro(repository)
    assert recorded(repository) == first, "the same from the same"
    write_rows(raw, [chat(f"Question {at}?", f"Answer {at}.") for at in range(20)])
    repro(repository)
    assert json.loads((made / "report.json").read_text())["num_train"] == 18
    assert all(recorded(repository)[path] != first[path] for path in ("data/helpdesk.jsonl", "data/prepared/helpdesk"))
    assert known_to_dvc(repository, first["data/helpdesk.jsonl"]) == []


def test_the_stages_name_files_that_are_there():
    for key, item in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["prepare"]["foreach"].items():
        assert (ROOT / item["source"]).is_file()
        assert yaml.safe_load((ROOT / "configs" / f"{key}.yaml").read_text())["data"]["source"] == item["source"]


def test_a_copy_never_replaces_a_folder_of_something_else(command, repository, tmp_path, monkeypatch):
    monkeypatch.chdir(repository)
    monkeypatch.setenv("BASE_MODEL_NAME", str(tmp_path / "model"))
    ended = command("data", "prepare", "configs/helpdesk.yaml", "--out", "configs")
    assert (ended.status, ended.err.splitlines()[0]) == (2, "error: configs holds other files too")
    assert [file.name for file in (repository / "configs").iterdir()] == ["helpdesk.yaml"]
    refused = command("data", "prepare", "configs/helpdesk.yaml", "--out", "configs/helpdesk.yaml")
    assert (refused.status, refused.err.splitlines()[0]) == (2, "error: cannot write configs/helpdesk.yaml")
