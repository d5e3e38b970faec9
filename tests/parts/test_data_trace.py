"""From a version back to its rows, and a person taken out of all of them: on a real registry, a real database, real files."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.home import write_text
from cluster.registry import evaluation_page
from configs.loader import load_chatbot
from data.copies import has_copy, send_data
from data.feedback import ACCEPTED, PENDING, Review
from data.feedback_store import stored_rows
from data.prepare import Prepared, prepare
from data.sources import dvc_hash
from tests.helpers.data import chat, tokenizer_folder, write_rows
from tests.helpers.feedback import fill, told


@pytest.fixture
def bot(home, tmp_path) -> str:
    """A chatbot with rows of its own, some of them synthetic, one with a name in it, and accepted feedback by two people."""
    rows = [chat(f"Question {at}?", f"Answer {at}.", split="train" if at else "heldout") for at in range(6)]
    rows += [chat("Reworded?", "Answer 1.", split="train", synthetic="templates"), chat("Who is Zoë Quill?", "Ours.", split="train")]
    source = write_rows(tmp_path / "chats.jsonl", rows)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "bot.yaml").write_text(f"name: bot\ndata: {{source: {source}, split: marked}}\n")
    asyncio.run(fill(told("a1", "One?"), told("a2", "Two?"), told("b1", "Three?", key_name="ben"), told("a3", "Four?", rating="down")))
    return "configs/bot.yaml"


@pytest.fixture
def trained(bot, command, registry, register, up) -> Prepared:
    """Version 1 without feedback, version 2 with it, version 3 whose rows are gone; one row of ada's still waits."""
    up(mlflow_url=registry.url)
    plain = prepare(load_chatbot(bot), tokenizer_folder())
    register("bot", data_fingerprint=plain.fingerprint, data_sources=plain.sources)
    command("data", "feedback", "bot")
    waiting = Review("bot").read(PENDING)
    Review("bot").decide([row for row in waiting if row["completion_id"] != "a2"], [])
    prepared = prepare(load_chatbot(bot), tokenizer_folder())
    register("bot", data_fingerprint=prepared.fingerprint, data_sources=prepared.sources)
    register("bot")
    registry.promote("bot:2")
    return prepared


def words(out: str) -> list[str]:
    """Return the lines with single spaces, as tables are set by their widest cell."""
    return [" ".join(line.split()) for line in out.splitlines()]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for name in ("train.jsonl", "heldout.jsonl") for line in (folder / name).read_text().splitlines()]


def test_a_version_is_traced_to_files_and_feedback(trained, command, tmp_path):
    ended = command("data", "trace", "bot:2")
    assert ended.status == 0, ended.err
    lines = words(ended.out)
    source = tmp_path / "chats.jsonl"
    assert f"source {source} {dvc_hash(source)} (unchanged)" in lines
    assert f"rows 6 train, 1 held out: {source}, as written" in lines
    assert f"rows 1 train, 0 held out: {source}, synthetic (templates)" in lines
    assert f"rows 2 train, 0 held out: {Review('bot').folder / ACCEPTED}, feedback" in lines
    told = [line.split(maxsplit=3)[3] for line in lines if line.startswith("feedback")]
    assert told == ["key ada, on bot:2: a1", "key ben, on bot:2: b1"]
    assert "feedback" not in command("data", "trace", "bot:1").out
    assert command("data", "trace", "bot").out == ended.out, "the live one"


def test_a_row_is_traced_by_its_words(trained, command, tmp_path):
    out = command("data", "trace", "bot:2", "--row", "who is zoë").out
    assert f"{tmp_path / 'chats.jsonl'}:8 train, as written" in words(out)
    ended = command("data", "trace", "bot:2", "--row", "never said")
    assert (ended.status, ended.err.splitlines()[0]) == (2, "error: no row of bot:2 holds 'never said'")


def test_what_is_gone_or_has_changed_is_said(trained, command, tmp_path):
    assert "nothing more can be said of its rows" in command("data", "trace", "bot:3").out
    (tmp_path / "chats.jsonl").write_text("{}\n")
    assert "(has changed since)" in command("data", "trace", "bot:2").out
    (tmp_path / "chats.jsonl").unlink()
    assert "(is gone)" in command("data", "trace", "bot:2").out
    refused = command("data", "trace", "bot:9")
    assert (refused.status, refused.err.splitlines()[0]) == (2, "error: bot has no version 9")


def test_a_person_is_forgotten_everywhere_and_the_versions_are_named(trained, command, home):
    before = {file: file.read_bytes() for file in home.rglob("*.jsonl")}
    shown = command("data", "forget", "ada")
    assert shown.status == 0, shown.err
    assert "nothing is changed yet" in shown.out
    assert {file: file.read_bytes() for file in home.rglob("*.jsonl")} == before
    done = command("data", "forget", "ada", "--yes")
    assert "saw them bot:2 (live): train again" in " ".join(done.out.split())
    assert "bot:1" not in done.out
    assert "unknown bot:3" in " ".join(done.out.split())
    assert {row["key_name"] for row in stored_rows()} == {"ben"}
    assert all(b"ada" not in file.read_bytes() for file in home.rglob("*.jsonl"))
    assert [row["completion_id"] for row in Review("bot").read(ACCEPTED)] == ["b1"]
    assert Review("bot").read(PENDING) == []
    assert [row["feedback"]["completion_id"] for row in rows_of(trained.folder) if row["feedback"]] == ["b1"]
    again = command("data", "forget", "ada")
    assert "earlier bot:2 (live): saw rows that were forgotten before" in " ".join(again.out.split()), "until it is trained again"
    assert "1 rows that it was trained on were taken out since" in command("data", "trace", "bot:2").out


def test_a_copy_in_the_clusters_storage_goes_too_and_joined_machines_are_named(trained, command, up, registry, tmp_path):
    storage = str(tmp_path / "storage")
    up(mlflow_url=registry.url, storage=storage)
    send_data(storage, trained.folder)
    assert f"delete data/{trained.folder.name} in each one's TANDEM_HOME" in " ".join(command("data", "forget", "ada", "--yes").out.split())
    assert not has_copy(storage, trained.folder.name)
    left = tmp_path / "storage" / "data" / trained.folder.name
    left.mkdir()  # as by a Tandem that did not look there
    assert command("data", "forget", "ada", "--yes").status == 0
    assert not left.exists()
    send_data(storage, trained.folder)
    assert [
        row["feedback"]["completion_id"] for row in rows_of(tmp_path / "storage" / "data" / trained.folder.name) if row["feedback"]
    ] == ["b1"]


def test_deleted_words_do_not_stay_in_the_databases_file(trained, command, home):
    asyncio.run(fill(told("z", "The secret of Quetzalcoatlus?", key_name="zed")))
    assert b"Quetzalcoatlus" in b"".join(file.read_bytes() for file in home.glob("feedback.db*"))
    assert command("data", "forget", "zed", "--yes").status == 0
    assert b"Quetzalcoatlus" not in b"".join(file.read_bytes() for file in home.glob("feedback.db*"))


def test_a_person_is_found_by_a_text_and_the_users_own_file_is_left_to_the_user(trained, command, tmp_path, home):
    source = (tmp_path / "chats.jsonl").read_bytes()
    done = command("data", "forget", "--text", "zoë quill", "--yes")
    assert f"yours {tmp_path / 'chats.jsonl'}:8: take it out there yourself" in " ".join(done.out.split())
    assert [name in done.out for name in ("bot:1", "bot:2")] == [True, True]
    assert (tmp_path / "chats.jsonl").read_bytes() == source
    assert not [row for row in rows_of(trained.folder) if "Zoë" in json.dumps(row, ensure_ascii=False)]
    assert len(stored_rows()) == 8, "nobody else's"
    assert "0 answers" in command("data", "forget", "--text", "Quil").out, "whole words only"
    short = command("data", "forget", "--text", "ab")
    assert (short.status, short.err.splitlines()[0]) == (2, "error: 'ab' is too short")


def test_evaluations_that_show_a_persons_rows_go_too(trained, bot, command, registry, home, tmp_path):
    """Version 3 was measured on a row of hers, version 2 only names her in an answer, and version 1 does neither."""
    held = "What is Zoë\nQuill's desk?"
    write_rows(tmp_path / "chats.jsonl", [chat("Question 1?", "Answer 1.", split="train"), chat(held, "Ours.", split="heldout")])
    measured = prepare(load_chatbot(bot), tokenizer_folder())
    registry.note(registry.find("bot:3"), {"data_fingerprint": measured.fingerprint})
    pages = {"bot:1": "nobody", "bot:2": "ask Zoë Quill&#39;s colleague", "bot:3": "a page that was cut before her"}
    for name, said in pages.items():
        version = registry.find(name)
        registry.write_evaluation(version, f"<p>{said}</p>")
        write_text(evaluation_page(version), f"<p>{said}</p>")
    shown = " ".join(command("data", "forget", "--text", "zoë quill's", "--yes").out.split())
    for name in ("bot:2", "bot:3"):
        assert f"page evaluation of {name} in MLflow" in shown
        assert not evaluation_page(registry.find(name)).exists()
        assert registry.read_evaluation(registry.find(name)).startswith("<!doctype html><p>This evaluation held rows")
    assert evaluation_page(registry.find("bot:1")).exists()
    assert registry.read_evaluation(registry.find("bot:1")) == "<p>nobody</p>"
    assert "saw them bot:3" in shown
    assert "saw them bot:2" not in shown
    again = " ".join(command("data", "forget", "--text", "zoë quill's").out.split())
    assert "page" not in again, "nothing is left to do"


def test_a_row_that_was_set_aside_was_seen_by_no_version(trained, bot, command, registry, home, tmp_path):
    with (tmp_path / "chats.jsonl").open("a") as stream:
        stream.write('{"messages": [{"role": "user", "content": "I am\\nWalburga Stern"}]}\n')
    prepared = prepare(load_chatbot(bot, ["data.skip_bad=true"]), tokenizer_folder())
    assert prepared.folder == trained.folder, "the same rows, and one that is bad"
    done = command("data", "forget", "--text", "Walburga Stern", "--yes")
    assert f"1 in {prepared.folder / 'bad.jsonl'}" in done.out
    assert "saw them" not in done.out
    assert (prepared.folder / "bad.jsonl").read_text() == ""


def test_a_run_that_breaks_off_can_be_repeated(trained, command, home):
    """The database comes last: without it, rows that a text was found in could no longer be told from others."""

    def break_off(_: set[str]) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.forget.delete_rows", break_off)
        assert command("data", "forget", "ada", "--yes").status == 130
    assert {row["key_name"] for row in stored_rows()} == {"ada", "ben"}
    assert "earlier bot:2" in " ".join(command("data", "forget", "ada", "--yes").out.split())
    assert {row["key_name"] for row in stored_rows()} == {"ben"}


def test_the_same_rows_made_again_are_not_called_forgotten(trained, command, bot):
    command("data", "forget", "--text", "Zoë Quill", "--yes")
    again = prepare(load_chatbot(bot), tokenizer_folder())
    assert again == replace(trained, from_cache=False), "the user's own file still has the row"
    assert "were taken out since" not in command("data", "trace", "bot:2").out
