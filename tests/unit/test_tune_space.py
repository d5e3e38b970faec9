"""A sweep's space is tried against the schema before anything starts: every mistake at once, and no setting that makes no sense."""

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.loader import load_chatbot, setting_paths, with_settings
from configs.schema import ChatbotConfig
from configs.space import PBT_SETTINGS, REFUSED, REFUSED_GROUPS, load_sweep, num_combinations

BASE = """\
name: bot
data: {source: rows.jsonl, max_length_tokens: 128}
train: {batch_size: 8}
serve: {max_lora_rank: 16}
tune:
"""


@pytest.fixture
def write(home, tmp_path):
    def write_config(*lines: str) -> Path:
        file = tmp_path / "bot.yaml"
        file.write_text(BASE + "".join(f"  {line}\n" for line in lines))
        return file

    return write_config


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_sweep(file, overrides)
    return str(refused.value)


def test_a_space_of_choices_needs_no_budget_and_has_a_known_size(write):
    config = load_sweep(write("space: {train.lora.rank: {choice: [4, 8]}, train.learning_rate: {choice: [1.0e-4, 1.0e-3, 1.0e-2]}}"))
    assert num_combinations(config.tune) == 6


def test_all_mistakes_are_told_at_once_with_line_and_nearest_name(write):
    told = refusal(
        write(
            "budget: {trials: 4}",
            "space:",
            "  train.lora.rnk: {choice: [8]}",
            "  train.lora.rank: {choice: [8, 32, x]}",
            "  train.learning_rate: {log: [1.0e-5, 2.0]}",
            "  train.lora: {choice: [8]}",
            "  dropout: {uniform: [0.1, 0.2]}",
        )
    )
    for line, words in (
        (8, "train.lora.rnk: no such setting; did you mean train.lora.rank?"),
        (9, "train.lora.rank=32 is over serve.max_lora_rank=16"),
        (9, "train.lora.rank: input should be a valid integer"),
        (10, "train.learning_rate: input should be less than or equal to 1, not 2.0"),
        (11, "train.lora: is a group; name one of train.lora.rank"),
        (12, "dropout: no such setting; did you mean train.lora.dropout?"),
    ):
        assert f"bot.yaml:{line}: {words}" in told
    assert told.startswith("6 mistakes")


def test_a_range_of_fractions_does_not_suit_a_whole_number(write):
    assert "fractional part" in refusal(write("budget: {trials: 4}", "space: {train.batch_size: {uniform: [8, 16]}}"))
    load_sweep(write("budget: {trials: 4}", "space: {train.batch_size: {integer: [8, 16]}}"))


def outside_training() -> list[str]:
    """One setting of every group but `train`, so that a new group is asked for too."""
    firsts = {path.partition(".")[0]: path for path, _ in setting_paths(ChatbotConfig)}
    return [path for group, path in firsts.items() if group != "train"]


@pytest.mark.parametrize("path", [*REFUSED, *outside_training()])
def test_what_does_not_change_the_training_is_refused_with_its_reason(write, path):
    told = refusal(write(f"space: {{{path}: {{choice: [1]}}}}"))
    assert f"{path}: cannot be varied: {REFUSED.get(path) or REFUSED_GROUPS[path.partition('.')[0]]}" in told


def test_several_workers_in_one_trial_are_refused(write):
    told = refusal(write("space: {train.lora.rank: {choice: [4]}}"), "train.num_workers=2")
    assert "train.num_workers=2: a trial takes one card" in told


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["seed: 1"], "tune.space: is empty"),
        (["space: {train.learning_rate: {log: [1.0e-5, 1.0e-3]}}"], "tune.budget: is missing"),
        (["scheduler: grid", "space: {train.learning_rate: {log: [1.0e-5, 1.0e-3]}}"], "each setting of tune.space must be a choice"),
        (["scheduler: pbt", "space: {train.learning_rate: {choice: [1.0e-5, 1.0e-3]}}"], "the size of the population"),
        (["scheduler: pbt", "budget: {trials: 4}", "space: {train.lora.rank: {choice: [4, 8]}}"], f"can vary {', '.join(PBT_SETTINGS)}"),
        (["space: {train.lora.rank: {choice: [4], integer: [4, 8]}}"], "exactly one of"),
        (["space: {train.lora.rank: {}}"], "exactly one of"),
        (["space: {train.learning_rate: {log: [0.0, 1.0]}}"], "ends over 0"),
        (["space: {train.learning_rate: {uniform: [1.0, 0.1]}}"], "lower end first"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(write, lines, words):
    assert words in refusal(write(*lines))


def test_a_space_on_the_command_line_is_checked_as_one_in_the_file(write):
    told = refusal(write("seed: 1"), "tune.space={train.lora.rank: {choice: [17]}}")
    assert "command line: 'tune.space={train.lora.rank: {choice: [17]}}': train.lora.rank=17 is over serve.max_lora_rank=16" in told


def test_a_trials_settings_take_the_place_of_the_configs(write):
    config = load_chatbot(write("seed: 1"))
    changed = with_settings(config, {"train.lora.rank": 8, "train.learning_rate": 0.01})
    assert (changed.train.lora.rank, changed.train.learning_rate, changed.train.batch_size) == (8, 0.01, 8)
    with pytest.raises(ConfigError, match="must divide"):
        with_settings(config, {"train.micro_batch_size": 3})


def test_the_command_refuses_before_anything_starts(command, write):
    ended = command("tune", str(write("space: {train.lora.rank: {choice: [x]}}")))
    assert ended.status == 2
    assert "valid integer" in ended.err
    assert "Traceback" not in ended.err


def test_resuming_takes_no_settings(command, write):
    ended = command("tune", str(write("seed: 1")), "train.max_steps=3", "--resume", "0" * 32)
    assert ended.status == 2
    assert "--resume takes no settings" in ended.err
