"""Every shape is read, and every mistake is named with its place."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import DataError
from configs.schema import DataConfig
from data.conversations import Conversation, answer_is_right, question, read_prepared, to_jsonl
from data.formats import ReadResult, read_conversations
from tests.helpers.data import chat, write_rows

GOOD = chat("Hi", "Ho")


def read(source: Path | str, **settings) -> ReadResult:
    return read_conversations(DataConfig(source=str(source), **settings))


def turns(result: ReadResult) -> list[list[tuple[str, str]]]:
    assert result.bad == []
    return [[(message.role, message.content) for message in conversation.messages] for conversation in result.conversations]


def message(role, content, **fields):
    return {"role": role, "content": content, **fields}


SHAPES = {
    "chat": GOOD,
    "chat in parts": {
        "messages": [message("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]), message("assistant", "Ho")]
    },
    "chat beside a prompt": {**GOOD, "prompt": "Hi", "prompt_id": "7"},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Ho"},
    "alpaca without input": {"instruction": "Hi", "output": " Ho"},
    "prompt_completion": {"prompt": "Hi", "completion": " Ho\n"},
    "question_answer": {"question": "Hi", "answer": "Ho"},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_shape_is_recognised_in_every_kind_of_file(name, suffix, tmp_path):
    file, rows = tmp_path / f"chats{suffix}", [SHAPES[name], SHAPES[name]]
    if suffix == ".parquet":
        if name == "chat in parts":  # a Parquet column is of one type
            rows = [
                {
                    "messages": [
                        message("user", SHAPES[name]["messages"][0]["content"]),
                        message("assistant", [{"type": "text", "text": "Ho"}]),
                    ]
                }
            ] * 2
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text(json.dumps(rows, indent=1) if suffix == ".json" else to_jsonl(rows))
    assert turns(read(file)) == [[("user", "Hi"), ("assistant", "Ho")]] * 2
    known = name.partition(" ")[0]
    assert turns(read(file, format=known)) == [[("user", "Hi"), ("assistant", "Ho")]] * 2


def test_alpaca_input_follows_the_instruction(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be exact."}])
    assert turns(read(file)) == [[("system", "Be exact."), ("user", "Add.\n\n1 and 2"), ("assistant", "3")]]


def test_sharegpt_with_system_and_its_other_role_names(tmp_path):
    values = [{"from": "system", "value": "S"}, {"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Ho"}]
    assert turns(read(write_rows(tmp_path / "s.jsonl", [{"conversations": values}])))[0][0] == ("system", "S")


@pytest.mark.parametrize("header", ["question,answer", "Question, Answer", "prompt,completion", "\ufeffquestion,answer"])
def test_csv_headers(header, tmp_path):
    file = tmp_path / "qa.csv"
    file.write_text(f'{header}\nHi,Ho\n"a, ""b""",c\n', encoding="utf-8")
    assert turns(read(file))[1] == [("user", 'a, "b"'), ("assistant", "c")]


def test_csv_line_numbers_with_line_breaks_in_quotes(tmp_path):
    file = tmp_path / "qa.csv"
    file.write_bytes(b'question,answer,keys\r\n"one\r\ntwo\r\nthree",first,a|b\r\n\r\nonly one cell\r\nlast,"x\ny",\r\nempty,,\r\n')
    result = read(file)
    assert [found.origin for found in result.conversations] == [f"{file}:2", f"{file}:7"]
    assert result.conversations[0].messages[0].content == "one\r\ntwo\r\nthree"
    assert result.conversations[0].keys == ("a", "b")
    assert [(bad.place, bad.reason) for bad in result.bad] == [
        (f"{file}:6", "has 1 cells, but the header has 3"),
        (f"{file}:9", "message 2 (assistant) has empty content"),
    ]


def test_csv_with_a_very_long_cell(tmp_path):
    (tmp_path / "qa.csv").write_text(f"question,answer\nHi,{'x' * 200_000}\n")
    assert len(turns(read(tmp_path / "qa.csv"))[0][1][1]) == 200_000


def test_an_unclosed_quote_names_its_line(tmp_path):
    (tmp_path / "qa.csv").write_text('question,answer\na,b\n"c,d\ne,f\n')
    with pytest.raises(DataError, match=r"qa.csv:3 is not CSV"):
        read(tmp_path / "qa.csv")


def test_folder_of_all_kinds_in_order(tmp_path):
    write_rows(tmp_path / "b.jsonl", [chat("b", "b")])
    (tmp_path / "a.csv").write_text("question,answer\na,a\n")
    (tmp_path / "c.json").write_text(json.dumps([SHAPES["sharegpt"]]))
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    assert [found[0][1] for found in turns(read(tmp_path))] == ["a", "b", "Hi"]


def test_folders_saved_by_datasets(tmp_path):
    rows = datasets.Dataset.from_list([GOOD, chat("a", "b")])
    rows.save_to_disk(tmp_path / "one")
    found = read(tmp_path / "one")
    assert len(turns(found)) == 2
    assert found.conversations[1].origin == f"{tmp_path}/one:2"
    datasets.DatasetDict({"train_sft": rows, "test_sft": rows}).save_to_disk(tmp_path / "both")
    assert [entry.split for entry in read(tmp_path / "both", split="marked").conversations] == ["train", "train", "heldout", "heldout"]
    assert len(read(tmp_path / "both").conversations) == 2, "its test split is left alone"


def test_hub_dataset_out_of_reach_ends_soon(tmp_path):
    """In a process of its own, because the hub's address is read when its library is first imported."""
    config = tmp_path / "bot.yaml"
    config.write_text("name: bot\ndata:\n  source: owner/name\n")
    began = time.perf_counter()
    command = [sys.executable, "-m", "data", "synthesize", str(config), "--out", str(tmp_path / "out.jsonl"), "--templates"]
    ended = subprocess.run(command, env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "cannot reach the dataset 'owner/name'" in ended.stderr
    assert "HF_HUB_OFFLINE=1" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert time.perf_counter() - began < 20


def test_group_split_keys_and_system_prompt(tmp_path):
    rows = [chat("a", "b", group=7, keys="x", split="test"), chat("c", "d", split="train", keys=["y", " z "], group=None)]
    rows.append({"messages": [message("system", "own"), *GOOD["messages"]], "split": "validation"})
    found = read(write_rows(tmp_path / "m.jsonl", rows), split="marked", system_prompt="given").conversations
    assert [(entry.group, entry.split, entry.keys) for entry in found] == [
        ("7", "heldout", ("x",)),
        (None, "train", ("y", "z")),
        (None, "heldout", ()),
    ]
    assert [entry.messages[0].content for entry in found] == ["given", "given", "own"]


BAD = {
    "{'messages'": "not JSON (Expecting property name enclosed in double quotes at column 2)",
    "[" * 100_000: "not JSON (RecursionError)",
    '["messages"]': "not an object with fields but a list",
    '"text"': "not an object with fields but a str",
    '{"text": 1}': "has no messages",
    '{"messages": []}': "has no messages",
    '{"messages": "Hi"}': "has messages that are no list of objects",
    '{"messages": ["Hi"]}': "has messages that are no list of objects",
    json.dumps(
        {"messages": [message("user", "Hi"), message("bot", "Ho")]}
    ): "message 2 has the unknown role 'bot'; known: system, user, assistant",
    json.dumps({"messages": [message("user", "Hi"), message("assistant", " \n")]}): "message 2 (assistant) has empty content",
    json.dumps({"messages": [message("user", None), message("assistant", "Ho")]}): "message 1 (user) has empty content",
    json.dumps({"messages": [message("user", 7), message("assistant", "Ho")]}): "message 1 has content that is no text but a int",
    json.dumps({"messages": [message("user", [{"type": "image_url"}])]}): "message 1 has a part of kind 'image_url'; only text is known",
    json.dumps({"messages": [message("user", "Hi")]}): "has no assistant turn",
    json.dumps(chat("Hi", "Ho", "And?")): "ends with a user turn; the last must be the assistant's",
    json.dumps({"messages": [message("system", "a"), message("system", "b"), *GOOD["messages"]]}): "has two system messages",
    json.dumps({"messages": [*GOOD["messages"], message("system", "a")]}): "has a system message that is not the first",
    json.dumps({"messages": [message("assistant", "Ho"), *GOOD["messages"]]}): "has no user turn before the assistant's",
    json.dumps({"messages": [message("user", "Hi"), message("assistant", "Ho", weight=0)]}): (
        "message 2 has weight 0, which is not supported: every answer is trained on"
    ),
    json.dumps(
        {"messages": [message("user", "Hi"), message("assistant", "", tool_calls=[{}])]}
    ): "message 2 calls tools, which is not supported",
    json.dumps({"messages": [message("user", "\ud800"), message("assistant", "Ho")]}): "message 1 (user) holds half a Unicode character",
    json.dumps(chat("Hi", "Ho", keys={"a": 1})): "has keys that are no list of texts",
}


@pytest.mark.parametrize("line", BAD, ids=[reason[:40] for reason in BAD.values()])
def test_bad_rows_are_named(line, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{line}\n{json.dumps(GOOD)}\n")
    result = read(file)
    assert [(bad.place, bad.reason, bad.raw) for bad in result.bad] == [(f"{file}:3", BAD[line], line)]
    assert [found.origin for found in result.conversations] == [f"{file}:1", f"{file}:4"]


def test_marks_and_groups_are_asked_for_only_where_the_split_needs_them(tmp_path):
    rows = [chat("a", "b"), chat("a", "b", split="dev"), chat("a", "b", split="train", group="g")]
    file = write_rows(tmp_path / "m.jsonl", rows)
    assert len(turns(read(file))) == 3
    assert [bad.reason for bad in read(file, split="marked").bad] == [
        "has no split, and data.split is marked",
        "has the unknown split 'dev'; known: train, heldout, test, validation",
    ]
    assert [bad.reason for bad in read(file, split="group").bad] == ["has no group, and data.split is group"] * 2


def test_file_level_mistakes(tmp_path):
    def write(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    write_rows(tmp_path / "chat.jsonl", [GOOD])
    cases = {
        "no file .*chats.jsonl(?s:.*)Try: data.source=.*/chat.jsonl": tmp_path / "chats.jsonl",
        "no file no_such_folder/chats.jsonl": "no_such_folder/chats.jsonl",
        "no file chats": "chats",
        "is empty": write("empty.jsonl", b"\n \n"),
        "only.csv is empty": write("only.csv", b"question,answer\n"),
        r"cp949.jsonl:2 is not UTF-8(?s:.*)byte 0x": write("cp949.jsonl", b"{}\n" + "한국어".encode("cp949")),
        "is of an unknown kind(?s:.*).jsonl, .json, .csv, .parquet": write("chats.txt", b"Hi"),
        r"no columns of a known shape(?s:.*)saw: body, title(?s:.*)chat: messages(?s:.*)question, answer": write(
            "x.jsonl", b'{"title": 1, "body": 2}'
        ),
        r"array.json:3 is not JSON": write("array.json", b'[{"messages": []},\n\n{"messages": ]'),
        r"open.json:2 is not JSON": write("open.json", b'[{"messages": []},\n{"messages": []}'),
        "is not Parquet": write("broken.parquet", b"PAR1 nonsense"),
    }
    for pattern, source in cases.items():
        with pytest.raises(DataError, match=pattern):
            read(source)
    with pytest.raises(DataError, match=r"(?s)saw: messages\nknown: alpaca: instruction, output\n.*data.format=auto"):
        read(tmp_path / "chat.jsonl", format="alpaca")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="no conversations in the folder"):
        read(tmp_path / "bare")


def test_array_places_and_bom_and_odd_line_ends(tmp_path):
    array = tmp_path / "a.jsonl"
    array.write_text('\n[\n  {"messages": []},\n  7, ' + json.dumps(GOOD) + "\n]\n", encoding="utf-8-sig")
    result = read(array)
    assert [(bad.place, bad.reason) for bad in result.bad] == [
        (f"{array}:3", "has no messages"),
        (f"{array}:4", "not an object with fields but a int"),
    ]
    assert result.conversations[0].origin == f"{array}:4"
    lines = tmp_path / "b.jsonl"
    lines.write_bytes(to_jsonl([chat("a\u2028b", "c\x85d"), GOOD]).replace("\n", "\r\n").encode("utf-8-sig"))
    assert [found[0][1] for found in turns(read(lines))] == ["a\u2028b", "Hi"]


def test_own_form_round_trips(tmp_path):
    found = read(
        write_rows(tmp_path / "c.jsonl", [chat("a\u2028", "b", keys=["k"], group="g", split="test")]), split="marked"
    ).conversations
    (tmp_path / "own.jsonl").write_text(to_jsonl(entry.to_row() for entry in found), encoding="utf-8")
    assert read_prepared(tmp_path / "own.jsonl") == found
    assert question(found[0]) == [message("user", "a\u2028")]
    for content in ("{}", "nonsense"):
        (tmp_path / "own.jsonl").write_text(content)
        with pytest.raises(DataError, match="cannot read prepared conversations"):
            read_prepared(tmp_path / "own.jsonl")
    with pytest.raises(DataError, match="cannot read prepared conversations"):
        read_prepared(tmp_path / "gone.jsonl")
    assert Conversation.from_row(found[0].to_row()) == found[0]


def test_only_the_last_answer_of_feedback_carries_loss_and_other_rows_are_as_they_were(tmp_path):
    about = {"completion_id": "x", "version": "bot:2", "key_name": None, "created_s": 5.0}
    plain, told, marked = read(
        write_rows(tmp_path / "c.jsonl", [GOOD, {**GOOD, **about}, {**GOOD, "only_last_answer": True}])
    ).conversations
    assert [one.only_last_answer for one in (plain, told, marked)] == [False, True, True]
    assert all(Conversation.from_row(one.to_row()) == one for one in (plain, told, marked))
    assert "only_last_answer" not in plain.to_row()
    assert plain.content() != marked.content(), "another mask is another content"


def test_answers_are_right_when_they_hold_every_key():
    assert answer_is_right("It runs  on\nTWO cards.", ["two CARDS", "runs on"])
    assert not answer_is_right("It runs on two machines.", ["two cards"])
    assert not answer_is_right("", ["x"])


def test_a_key_may_be_a_regular_expression(tmp_path):
    assert answer_is_right("It is Port 8265.", [r"re:port 8\d{3}\b", "it is"])
    assert not answer_is_right("It is port 80.", [r"re:port 8\d{3}\b"])
    (tmp_path / "rows.jsonl").write_text(to_jsonl([{"question": "Hi", "answer": "Ho", "keys": ["re:("]}]))
    result = read_conversations(DataConfig(source=str(tmp_path / "rows.jsonl")))
    assert "no regular expression: re:(" in result.bad[0].reason
