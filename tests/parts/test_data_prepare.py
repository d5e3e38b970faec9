"""From rows to two files and a report: exact counts, one identity for one content, and nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.errors import DataError
from data.__main__ import app
from data.conversations import answer_is_right, read_prepared
from data.prepare import Prepared, prepare
from data.show import paint, prepared_table, show_rows
from data.template import load_tokenizer, tokenize
from tests.helpers.data import ALTERNATING, chat, chatbot, llama3_folder, tokenizer_folder, write_rows

ROWS = [chat(f"How do I start {number}?", f"Run it {number}.", group=f"g{number // 2}", keys=["run"]) for number in range(20)]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def source(tmp_path) -> Path:
    return write_rows(tmp_path / "chats.jsonl", ROWS)


def run(tmp_path, source, *overrides, model_folder=None) -> Prepared:
    return prepare(chatbot(tmp_path, source, *overrides), model_folder or tokenizer_folder())


def left_behind(home: Path) -> list[str]:
    return sorted(str(file.relative_to(home)) for file in home.rglob("*") if file.is_file())


def test_report_counts_what_the_files_hold(tmp_path, source, home):
    prepared = run(tmp_path, source)
    train, heldout = read_prepared(prepared.train_file), read_prepared(prepared.heldout_file)
    tokenizer = load_tokenizer(tokenizer_folder())
    rows = [tokenize(conversation, tokenizer) for conversation in train]
    assert (prepared.num_train, prepared.num_heldout) == (len(train), len(heldout)) == (18, 2)
    assert prepared.num_train_tokens == sum(len(row.input_ids) for row in rows)
    assert prepared.num_loss_tokens == sum(row.num_loss_tokens for row in rows)
    assert prepared.longest_tokens == max(len(tokenize(c, tokenizer).input_ids) for c in (*train, *heldout))
    assert {conversation.split for conversation in train} == {"train"}
    assert train[0].keys == ("run",)
    assert prepared.folder == home / "data" / f"bot-{prepared.fingerprint}"
    assert left_behind(home) == [
        f"data/bot-{prepared.fingerprint}/{name}" for name in ("bad.jsonl", "heldout.jsonl", "report.json", "train.jsonl")
    ]
    assert Prepared.from_json((prepared.folder / "report.json").read_text(), prepared.folder) == prepared


def test_second_time_comes_from_the_cache_until_something_changes(tmp_path, source):
    first = run(tmp_path, source)
    second = run(tmp_path, source)
    assert second == Prepared.from_json(first.to_json(), first.folder, from_cache=True)
    for change in ("data.split_seed=5", "data.system_prompt=Hi", "data.max_length_tokens=500"):
        assert not run(tmp_path, source, change).from_cache
    assert not run(tmp_path, source, model_folder=llama3_folder()).from_cache
    write_rows(source, ROWS[:-1])
    assert not run(tmp_path, source).from_cache


@pytest.mark.parametrize("damage", ["train.jsonl", "heldout.jsonl", "report.json"])
def test_damaged_results_are_made_anew(damage, tmp_path, source):
    first = run(tmp_path, source)
    (first.folder / damage).write_text((first.folder / damage).read_text()[:-40])
    again = run(tmp_path, source)
    assert not again.from_cache
    assert again == first
    assert len(read_prepared(again.train_file)) == 18


def test_fingerprint_is_of_the_content_alone(tmp_path, source):
    first = run(tmp_path, source)
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "named otherwise.jsonl"
    moved.write_text("\n\n" + source.read_text())
    other = run(tmp_path, moved)
    assert (other.fingerprint, other.folder, other.from_cache) == (first.fingerprint, first.folder, False)
    assert read_prepared(other.train_file)[0].origin.startswith(str(moved))
    assert run(tmp_path, source, model_folder=llama3_folder()).fingerprint == first.fingerprint
    for change in ("data.split_seed=5", "data.system_prompt=Hi", "data.heldout_share=0.3", "data.split=group"):
        assert run(tmp_path, source, change).fingerprint != first.fingerprint
    assert len({run(tmp_path, write_rows(source, [*ROWS[:-1], chat("x", "y", keys=keys)])).fingerprint for keys in ([], ["y"])}) == 2


def test_all_bad_rows_are_named_and_nothing_is_written(tmp_path, home):
    rows = [*ROWS, *({"messages": [{"role": "user", "content": "Hi"}]} for _ in range(22)), chat("<|im_end|>", "Ho")]
    source = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError) as caught:
        run(tmp_path, source)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"23 bad rows in {source}"
    assert lines[1] == f"  {source}:21: has no assistant turn"
    assert lines[-2:] == ["  and 3 more", "Try: mend them, or set them aside with data.skip_bad=true"]
    assert len(lines) == 1 + 20 + 2
    assert left_behind(home) == []


def test_bad_rows_are_set_aside_when_asked(tmp_path, source):
    rows = [*ROWS, {"messages": []}, chat("<|im_end|>", "Ho")]
    prepared = run(tmp_path, write_rows(source, rows), "data.skip_bad=true")
    assert (prepared.num_bad, prepared.num_train) == (2, 18)
    bad = [json.loads(line) for line in (prepared.folder / "bad.jsonl").read_text().splitlines()]
    assert [(row["place"], row["reason"]) for row in bad] == [
        (f"{source}:21", "has no messages"),
        (f"{source}:22", "a message holds '<|im_end|>', with which the model's template marks turns"),
    ]
    assert bad[0]["raw"] == '{"messages": []}'
    with pytest.raises(DataError, match="2 bad rows, and no other"):
        run(tmp_path, write_rows(source, rows[20:]), "data.skip_bad=true")


def test_rows_that_the_template_refuses_are_bad_rows(tmp_path, source):
    twice = {"messages": [{"role": "user", "content": "a"}, *chat("b", "c")["messages"]]}
    with pytest.raises(DataError, match=r"chats.jsonl:21: the model's chat template refuses it: roles must alternate"):
        run(tmp_path, write_rows(source, [*ROWS, twice]), model_folder=tokenizer_folder(ALTERNATING))


def test_too_long_rows_are_dropped_or_cut_and_counted(tmp_path, source, home):
    rows = [*ROWS, chat("Hi", "long " * 100), chat("long " * 100, "Ho")]
    write_rows(source, rows)
    longest = run(tmp_path, source).longest_tokens
    for too_long, counts, told in (("drop", (2, 0, 20), "2 dropped"), ("cut", (1, 1, 21), "1 dropped and 1 cut")):
        prepared = run(tmp_path, source, "data.max_length_tokens=120", f"data.too_long={too_long}")
        assert (prepared.num_dropped_too_long, prepared.num_cut, prepared.num_train + prepared.num_heldout) == counts
        assert prepared.longest_tokens <= 120
        assert prepared.too_long(120) == (
            f"2 of 22 conversations are over data.max_length_tokens=120: {told}; the longest has {longest} tokens. "
            f"To keep all: data.max_length_tokens={longest}"
        )
    assert run(tmp_path, source, f"data.max_length_tokens={longest}").too_long(longest) == ""
    before = left_behind(home)
    with pytest.raises(DataError, match=r"(?s)nothing left to train on.*too long and dropped; the limit is 16 tokens.*max_length_tokens="):
        run(tmp_path, source, "data.max_length_tokens=16")
    with pytest.raises(DataError, match="cut, which left no answer in them"):
        run(tmp_path, source, "data.max_length_tokens=16", "data.too_long=cut")
    assert left_behind(home) == before


def test_duplicates_and_leaks_are_counted(tmp_path, source):
    rows = [chat("a", "b", split="train"), chat("A", "b", split="train"), chat("c", "d", split="train"), chat("c", "d", split="test")]
    prepared = run(tmp_path, write_rows(source, rows), "data.split=marked")
    assert (prepared.num_duplicates, prepared.num_leaks, prepared.num_train, prepared.num_heldout) == (1, 1, 1, 1)


def test_several_rows_on_one_line_of_an_array(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert run(tmp_path, tmp_path / "a.json").num_train == 18


def test_a_failure_while_writing_leaves_nothing(tmp_path, source, home):
    home.mkdir()
    (home / "data").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="data"):
        run(tmp_path, source)
    assert left_behind(home) == ["data"]


def test_inspection_paints_exactly_the_loss(tmp_path, source, capsys):
    prepared = run(tmp_path, source)
    tokenizer = load_tokenizer(tokenizer_folder())
    painted = paint(tokenize(read_prepared(prepared.train_file)[0], tokenizer), tokenizer)
    assert [painted.plain[span.start : span.end] for span in painted.spans if span.style == "green"] == ["Run it 0.<|im_end|>"]
    show_rows(prepared, tokenizer_folder(), chatbot(tmp_path, source).data, 2)
    shown = capsys.readouterr().out
    assert f"{prepared.num_loss_tokens:,}" in shown
    assert shown.count("named SmolLM") == 2
    assert prepared_table(prepared).row_count == 11


@pytest.fixture
def config_file(tmp_path, source) -> Path:
    """A config whose model is a folder with config.json and safetensors, as the model module asks; only its tokenizer is read."""
    model = tmp_path / "model"
    shutil.copytree(tokenizer_folder(), model)
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(b"")
    file = tmp_path / "bot.yaml"
    file.write_text(f"name: bot\nmodel:\n  name: {model}\ndata:\n  source: {source}\n")
    return file


def test_command_line_prepares_inspects_and_synthesizes(tmp_path, config_file):
    for words, shown in (
        (["prepare", str(config_file)], "bot-"),
        (["prepare", str(config_file), "data.heldout_share=0.5"], "bot-"),
        (["inspect", str(config_file), "--rows", "1"], "chats.jsonl:1: "),
        (["prepare", str(config_file), "data.max_length_tokens=101", "data.too_long=cut"], "warning  10 of 20 conversations are over"),
        (
            ["synthesize", str(config_file), "data.split=group", "--out", str(tmp_path / "x.jsonl"), "--templates", "--per-fact", "2"],
            "18 of them new",
        ),
    ):
        ended = CliRunner().invoke(app, words, catch_exceptions=False)
        assert ended.exit_code == 0
        assert shown in ended.output


def test_command_line_says_what_is_wrong_without_a_traceback(tmp_path, config_file, command):
    missing = f"data.source={tmp_path}/gone.jsonl"
    for words, reason in (
        (["prepare", str(config_file), missing], f"error: no file {tmp_path}/gone.jsonl"),
        (["inspect", str(config_file), "data.sorce=x"], "data.sorce: no such setting; did you mean data.source?"),
        (["synthesize", str(config_file), missing, "--out", str(tmp_path / "x.jsonl")], f"error: no file {tmp_path}/gone.jsonl"),
        (["prepare", str(config_file), "--rows", "1"], "No such option"),
    ):
        ended = command("data", *words)
        assert (ended.status, ended.out) == (2, "")
        assert reason in ended.err
        assert "Traceback" not in ended.err


def test_personal_data_is_taken_out_of_a_source_where_the_config_wants_it(tmp_path, source, home):
    rows = [*ROWS, chat("I am Martha Okonkwo, martha@example.com.", "Hello Martha Okonkwo.", keys=["run"]), {"messages": [{"Martha": 1}]}]
    write_rows(source, rows)
    scrubbed = run(tmp_path, source, "data.scrub=true", "data.skip_bad=true")
    assert scrubbed.scrubbed == {"person": 2, "email": 1}
    assert not [name for name in left_behind(home) if "Martha" in (home / name).read_text()]
    texts = [row.messages[0].content for row in (*read_prepared(scrubbed.train_file), *read_prepared(scrubbed.heldout_file))]
    assert "I am <PERSON>, <EMAIL>." in texts
    plain = run(tmp_path, source, "data.skip_bad=true")
    assert (plain.scrubbed, plain.fingerprint == scrubbed.fingerprint) == ({}, False)


OWNED = "Martha Okonkwo owns it, write to martha@example.com."


def test_keys_go_with_their_answer_groups_keep_no_name_and_the_configs_prompt_stays(tmp_path, source, home):
    keys = ["martha okonkwo", r"re:martha@example\.com", "owns it", "Okonkwo", "Dmitri Volkov"]
    prompt = "You are the helpdesk of Martha Okonkwo."
    own = {"messages": [{"role": "system", "content": prompt + " "}, *chat("Who else?", "Nobody.")["messages"]], "group": "g0"}
    write_rows(source, [*ROWS, chat("Who owns it?", OWNED, keys=keys, group="Martha Okonkwo"), own])
    prepared = run(tmp_path, source, "data.scrub=true", "data.split=group", f"data.system_prompt={prompt}")
    rows = [*read_prepared(prepared.train_file), *read_prepared(prepared.heldout_file)]
    (row,) = [row for row in rows if "owns it" in row.messages[-1].content]
    assert row.messages[-1].content == "<PERSON> owns it, write to <EMAIL>."
    assert row.keys == ("<PERSON>", "re:<EMAIL>", "owns it"), "half a name, and a name that the answer has not, are asked for no more"
    assert answer_is_right(row.messages[-1].content, row.keys)
    assert row.messages[0].content == prompt, "as it is served"
    (other,) = [row for row in rows if row.messages[-1].content == "Nobody."]
    assert other.messages[0].content == "You are the helpdesk of <PERSON>. ", "a row's own is scrubbed"
    assert "Martha" not in " ".join(str(row.group) for row in rows)
    assert len({row.group for row in rows}) == 11, "groups stay apart"
