"""The command line of configs: exit status 2 without a traceback, and a schema that explains itself."""

import json
import os
import subprocess
import sys

import pytest

from configs.cli import parse_duration_s
from configs.errors import ConfigError
from configs.loader import ROOT

BOT = "name: bot\ndata:\n  source: chats.jsonl\n"
HEAVY = ("mlflow", "ray", "torch", "transformers", "vllm")


@pytest.fixture
def bot(home, tmp_path):
    (tmp_path / "bot.yaml").write_text(BOT)
    return "bot.yaml"


def test_a_mistake_ends_with_status_2_without_a_traceback_and_without_anything_heavy(bot, tmp_path):
    at_exit = f"import atexit, sys; atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules]))"
    module = "import runpy; sys.argv = ['', 'check', 'bot.yaml', 'train.lora.rnak=8']; runpy.run_module('configs', run_name='__main__')"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"{at_exit}; {module}"]
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "[]\n")
    assert ended.stderr.startswith("error: one mistake in bot.yaml\n")
    assert "train.lora.rnak: no such setting; did you mean train.lora.rank?" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_check_says_what_the_config_is(command, bot):
    ended = command("configs", "check", bot, "model.name=some/model")
    assert (ended.status, ended.out, ended.err) == (0, "ok  bot.yaml is the chatbot bot on some/model\n", "")


def test_show_prints_every_default_as_json(command, bot):
    shown = json.loads(command("configs", "show", bot, "train.lora.rank=32").out)
    assert (shown["name"], shown["train"]["lora"]["rank"], shown["serve"]["port"]) == ("bot", 32, 8000)


def test_machine_checks_by_name(command):
    assert command("configs", "machine").out == "ok  auto: auto\n"
    assert command("configs", "machine", "rtx5090_5060ti").out == "ok  rtx5090_5060ti: 2 cards\n"
    refused = command("configs", "machine", "auto", "ray_port=80")
    assert refused.status == 2
    assert "ray_port: input should be greater than or equal to 1024" in refused.err
    assert "`python -m configs schema --machine` lists every setting" in refused.err


@pytest.mark.parametrize("words", [["schema"], ["schema", "--machine"]])
def test_schema_describes_every_setting(words, command):
    schema = json.loads(command("configs", *words).out)
    groups = {"": schema, **schema["$defs"]}
    settings = [(f"{group}.{name}", about) for group, shape in groups.items() for name, about in shape["properties"].items()]
    assert len(settings) >= 8
    # A group is described where it is defined.
    described = [groups[about["$ref"].rpartition("/")[2]] if "$ref" in about else about for _, about in settings]
    assert [path for (path, _), about in zip(settings, described, strict=True) if not about.get("description")] == []


@pytest.mark.parametrize("module", ["configs", "cluster", "data", "serve", "train", "tune"])
def test_help_lists_the_commands(module, command):
    ended = command(module, "--help")
    assert ended.status == 0
    assert f"python -m {module}" in ended.out


@pytest.mark.parametrize("words", [["chekc", "bot.yaml"], ["check"], ["check", "bot.yaml", "--rank", "8"]])
def test_words_that_name_no_command_or_option_end_with_status_2(words, command):
    ended = command("configs", *words)
    assert (ended.status, ended.out) == (2, "")
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("module", "word", "says"),
    [
        ("serve", "promot", "Did you mean 'promote'?"),
        ("train", "evaluat", "Did you mean 'evaluate'?"),
        ("train", "helpdesk", "no config file helpdesk"),
        ("train", "evaluate.yaml", "no config file evaluate.yaml"),
    ],
)
def test_a_misspelt_command_is_no_config(module, word, says, command):
    ended = command(module, word, "helpdesk:1")
    assert (ended.status, says in ended.err) == (2, True), ended.err


def test_a_config_may_be_named_nearly_like_a_command(command, home, tmp_path):
    (tmp_path / "runs").write_text(BOT)
    assert "the cluster is not up" in command("train", "runs").err


def test_a_file_name_in_brackets_is_no_markup(command, tmp_path):
    (tmp_path / "[red].yaml").write_text(BOT)
    assert "[red].yaml" in command("configs", "check", "[red].yaml").out


@pytest.mark.parametrize(("text", "seconds"), [("30d", 2_592_000), ("12h", 43_200), ("5m", 300)])
def test_durations(text, seconds):
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "0d", "-1d", "1w", "1.5h", "d"])
def test_what_is_no_duration(text):
    with pytest.raises(ConfigError, match="is no time"):
        parse_duration_s(text)
