"""More conversations from seed facts: by templates, and by a model behind a real HTTP server."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from configs.errors import ClusterError, DataError
from data.formats import read_conversations
from data.reword import NEAR_DUPLICATE, is_near_any, likeness, reword_by_templates
from data.split import split_conversations
from data.synthesize import Options, synthesize
from tests.helpers.data import chat, chatbot, write_rows
from tests.helpers.json_door import JsonDoor, listening

NOBODY = "http://127.0.0.1:9/v1"
SEEDS = [
    chat("How do I start the cluster?", "Run python -m cluster up.", group="start", split="train", keys=["cluster up"]),
    chat("What is an adapter?", "A small set of weights.", group="adapter", split="train", keys=["weights"]),
    chat("Tell me how to start the cluster.", "Run python -m cluster up.", group="start", split="heldout", keys=["cluster up"]),
]


class FakeModel(JsonDoor):
    """An OpenAI-compatible endpoint; `reply` makes the text, `served` are its models, `status` its mood."""

    served: tuple[str, ...] = ("smollm2-135m",)
    status = 200
    num_answers_left = 1000
    prompts: list[str]
    reply = staticmethod(lambda prompt: "")

    def do_GET(self) -> None:
        self.send_json(
            self.status,
            {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in self.served]},
        )

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).num_answers_left -= 1
        if self.num_answers_left < 0:
            self.connection.close()  # as when the server dies
            return
        prompt = request["messages"][0]["content"]
        self.prompts.append(prompt)
        message = {"role": "assistant", "content": self.reply(prompt)}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        self.send_json(self.status, {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [choice]})


@contextmanager
def endpoint(**settings) -> Iterator[tuple[str, type[FakeModel]]]:
    handler = type(
        "Handler", (FakeModel,), {"prompts": [], **{name: staticmethod(v) if callable(v) else v for name, v in settings.items()}}
    )
    with listening(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as address:
        yield f"{address}/v1", handler


@pytest.fixture
def config(tmp_path):
    return chatbot(tmp_path, write_rows(tmp_path / "seeds.jsonl", SEEDS), "data.split=marked", "data.system_prompt=Be brief.")


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def new(file: Path) -> list[dict]:
    return [row for row in rows(file) if "synthetic" in row]


def asked(row: dict) -> str:
    return row["messages"][-2]["content"]


def test_templates_need_no_model(tmp_path, config):
    out = tmp_path / "out.jsonl"
    tally = synthesize(config, Options(out, num_per_fact=6, endpoint=NOBODY, templates=True))
    made = new(out)
    assert (tally.num_new, len(made), tally.by_model) == (12, 12, 0)
    assert [row["group"] for row in made] == ["start"] * 6 + ["adapter"] * 6
    assert all(row["messages"][-1]["content"] == "Run python -m cluster up." and row["keys"] == ["cluster up"] for row in made[:6])
    assert {row["split"] for row in made} == {"train"}
    assert len({asked(row) for row in made}) == 12
    assert len(rows(out)) == 12 + len(SEEDS)
    assert all(row["messages"][0]["role"] == "user" for row in rows(out)), "the system prompt stays in the config"
    assert all("origin" not in row for row in rows(out))


def test_the_new_file_can_be_trained_on(tmp_path, config):
    out = tmp_path / "out.jsonl"
    synthesize(config, Options(out, templates=True))
    result = read_conversations(config.data.model_copy(update={"source": str(out)}))
    sides = split_conversations(result.conversations, config.data)
    assert result.bad == []
    assert (len(sides.heldout), sides.num_leaks, sides.num_duplicates) == (1, 0, 0)


def test_held_out_wordings_never_leak(tmp_path, config):
    """The first template for `How do I ...` is the very wording that is held out."""
    assert "Tell me how to start the cluster." in reword_by_templates("How do I start the cluster?")
    out = tmp_path / "out.jsonl"
    tally = synthesize(config, Options(out, templates=True))
    assert tally.num_leaks >= 1
    assert "Tell me how to start the cluster." not in {asked(row) for row in new(out)}


def test_a_model_rewords(tmp_path, config):
    def reply(prompt: str) -> str:
        thing = "start the cluster" if "cluster" in prompt else "adapter"
        lines = (
            f"1. In what way do I bring up: {thing}?",
            f'- "Need help with: {thing}"',
            f"• May I have words on {thing}, please?",
            "Yes, of course!",
        )
        return "Sure! Here you go:\n\n" + "\n".join(lines)

    with endpoint(reply=reply) as (url, handler):
        tally = synthesize(config, Options(tmp_path / "out.jsonl", num_per_fact=3, endpoint=url))
    made = new(tmp_path / "out.jsonl")
    assert [asked(row) for row in made[:3]] == [
        "In what way do I bring up: start the cluster?",
        "Need help with: start the cluster",
        "May I have words on start the cluster, please?",
    ]
    assert {row["synthetic"] for row in made} == {"smollm2-135m"}
    assert (tally.num_new, tally.by_model) == (6, 6)
    assert "How do I start the cluster?" in handler.prompts[0]
    assert "Write 3 different ways" in handler.prompts[0]


def test_near_duplicates_and_leaks_of_a_model_are_left_out(tmp_path, config):
    same = [
        "How do I start the CLUSTER",
        "how do i start the cluster ?!",
        "Tell me how to start the cluster!",
        "Which command brings the cluster up?",
    ]
    with endpoint(reply=lambda prompt: "\n".join([*same, same[-1].upper()])) as (url, _):
        tally = synthesize(config, Options(tmp_path / "out.jsonl", num_per_fact=4, endpoint=url))
    assert [asked(row) for row in new(tmp_path / "out.jsonl") if row["group"] == "start"] == ["Which command brings the cluster up?"]
    assert tally.num_leaks >= 1
    assert tally.num_near_duplicates >= 3
    assert tally.facts_short == ["start", "adapter"]


def test_nobody_answers_so_templates_take_over_with_a_notice(tmp_path, config, capsys):
    tally = synthesize(config, Options(tmp_path / "out.jsonl", num_per_fact=2, endpoint=NOBODY))
    assert (tally.num_new, tally.by_model) == (4, 0)
    assert f"{NOBODY} cannot be reached: from here on, fixed English templates" in capsys.readouterr().out


def test_endpoint_that_dies_half_way(tmp_path, config, capsys):
    replies = "Which command brings the cluster up?\nNeed the cluster running, how?"
    with endpoint(reply=lambda prompt: replies, num_answers_left=1) as (url, _):
        tally = synthesize(config, Options(tmp_path / "out.jsonl", num_per_fact=2, endpoint=url))
    assert (tally.by_model, tally.num_new) == (2, 4)
    assert "does not answer any more" in capsys.readouterr().out


def test_endpoint_that_refuses_is_an_error_and_writes_nothing(tmp_path, config):
    out = tmp_path / "out.jsonl"
    cases = [
        ({"served": ("gpt-x",)}, "", r"(?s)does not serve the model.*wanted: smollm2-135m, bot\nserved: gpt-x\nTry: --model gpt-x"),
        ({}, "mine", r"wanted: mine"),
        ({"status": 401}, "", r"(?s)did not answer as an OpenAI-compatible endpoint.*set OPENAI_API_KEY"),
        ({"status": 404}, "", r"(?s)did not answer as an OpenAI-compatible endpoint.*check --endpoint"),
    ]
    for settings, model, pattern in cases:
        with endpoint(**settings) as (url, _), pytest.raises(DataError, match=pattern):
            synthesize(config, Options(out, endpoint=url, model=model))
    assert not out.exists()


def test_an_existing_file_is_kept_unless_forced(tmp_path, config):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(DataError, match="is there already"):
        synthesize(config, Options(out, templates=True))
    assert out.read_text() == "mine"
    synthesize(config, Options(out, templates=True, force=True))
    assert len(new(out)) == 16


def test_a_place_that_can_be_no_file_is_refused_before_the_work(tmp_path, config):
    with pytest.raises(DataError, match="is a folder"):
        synthesize(config, Options(tmp_path, templates=True, force=True))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ClusterError, match=r"(?s)cannot write .*another --out"):
        synthesize(config, Options(tmp_path / "file" / "out.jsonl", templates=True))


def test_bad_seeds_are_refused(tmp_path, config):
    write_rows(tmp_path / "seeds.jsonl", [*SEEDS, {"messages": []}])
    with pytest.raises(DataError, match=r"(?s)one bad row.*seeds.jsonl:4: has no messages"):
        synthesize(config, Options(tmp_path / "out.jsonl", templates=True))


def test_later_turns_are_reworded_and_earlier_ones_kept(tmp_path):
    seeds = [chat("Hi", "Hello!", "What is a card?", "One GPU.", split="train"), chat("x", "y", split="heldout")]
    config = chatbot(tmp_path, write_rows(tmp_path / "seeds.jsonl", seeds), "data.split=marked")
    synthesize(config, Options(tmp_path / "out.jsonl", num_per_fact=1, templates=True))
    assert [message["content"] for message in new(tmp_path / "out.jsonl")[0]["messages"]] == [
        "Hi",
        "Hello!",
        "Can you explain a card?",
        "One GPU.",
    ]


def test_likeness():
    assert likeness("How do I start?", "how do I START") == 1.0
    assert likeness("How do I start the serve card?", "How do I start the train card?") < NEAR_DUPLICATE
    assert likeness("", "anything") == 0.0
    assert is_near_any("한국어로 어떻게 시작하나요?", ["한국어로 어떻게 시작하나요"], NEAR_DUPLICATE)
    assert not is_near_any("What?", [], 0.0)


@pytest.mark.parametrize("question", ["How do I start?", "GPU?", "I need help", "왜요?", "what is {braces} and {0}?"])
def test_templates_keep_the_words(question):
    wordings = reword_by_templates(question)
    assert len(wordings) >= 10
    assert question not in wordings
    assert all(likeness(wording, question) > 0.05 for wording in wordings)
