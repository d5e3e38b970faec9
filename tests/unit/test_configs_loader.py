"""Every mistake in a config is named with its place, what is allowed, and the nearest right name."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from configs.errors import ConfigError, TandemError
from configs.loader import ROOT, load_chatbot, load_machine, setting_paths, with_overrides
from configs.schema import ChatbotConfig, Environment, MachineConfig

BOT = "name: bot\ndata:\n  source: chats.jsonl\n"  # three lines; what a test adds begins on line 4
pytestmark = pytest.mark.usefixtures("home")


def load(text: str, *overrides: str) -> ChatbotConfig:
    Path("bot.yaml").write_text(text, encoding="utf-8")
    return load_chatbot("bot.yaml", overrides)


def load_desk(text: str, *overrides: str) -> MachineConfig:
    Path("desk.yaml").write_text(text, encoding="utf-8")
    return load_machine("desk.yaml", overrides)


def mistakes(read, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        read(text, *overrides)
    return [line.strip() for line in refused.value.why.splitlines()]


def test_only_what_differs_need_be_said():
    config = load(BOT)
    assert (config.name, config.data.source, config.model.name, config.train.lora.rank) == ("bot", "chats.jsonl", "smollm2-135m", 16)


WRONG = {
    "a misspelt key": ("train:\n  lora:\n    rnak: 8\n", "6: train.lora.rnak: no such setting; did you mean train.lora.rank?"),
    "a misspelt group": ("trian:\n  num_epochs: 1\n", "4: trian: no such setting; did you mean train?"),
    "a key in the wrong group": ("rank: 8\n", "4: rank: no such setting; did you mean train.lora.rank?"),
    "a key like no other": ("zzzzzz: 8\n", "4: zzzzzz: no such setting"),
    "a word for a number": (
        "train:\n  batch_size: many\n",
        "5: train.batch_size: input should be a valid integer, unable to parse string as an integer, not 'many'. "
        "Conversations a step, over all workers.",
    ),
    "a broken number": (
        "train:\n  batch_size: 1.5\n",
        "5: train.batch_size: input should be a valid integer, got a number with a fractional part, not 1.5. "
        "Conversations a step, over all workers.",
    ),
    "rank 0": (
        "train:\n  lora:\n    rank: 0\n",
        "6: train.lora.rank: input should be greater than or equal to 1, not 0. Rank of the two small matrices beside each weight.",
    ),
    "true for a number": (
        "train:\n  lora:\n    rank: true\n",
        "6: train.lora.rank: a number is wanted, not True. Rank of the two small matrices beside each weight.",
    ),
    "no for a number that may be left out": (
        "train:\n  max_steps: no\n",
        "5: train.max_steps: a number is wanted, not False. Stop after so many steps, whatever `num_epochs` says.",
    ),
    "none of the words allowed": (
        "data_:\nmodel:\n  precision: fp64\n",
        "6: model.precision: input should be 'auto', 'bf16' or 'fp32', not 'fp64'. "
        "Number format of the base weights; `auto` takes bf16 wherever the card computes in it.",
    ),
    "a group without settings": (
        "train:\n",
        "4: train: input should be a valid dictionary or instance of TrainConfig, not None. How the adapter is trained.",
    ),
    "a list for a mapping": (
        "train: [1]\n",
        "4: train: input should be a valid dictionary or instance of TrainConfig, not [1]. How the adapter is trained.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_named_with_its_line_path_and_what_is_allowed(name):
    lines, expected = WRONG[name]
    assert f"bot.yaml:{expected}" in mistakes(load, BOT + lines)


def test_all_mistakes_are_named_at_once_each_with_its_own_line():
    text = "name: Bot Bot\nmodel:\n  nam: x\ndata:\n  format: csv\ntrain:\n  lora:\n    rank: 0\n    alpha: -1\n"
    found = mistakes(load, text, "serve.port=80", "train.seed=abc")
    assert {re.match(r"(command line: '.*'|.*?): [a-z_.]+", entry)[0] for entry in found} == {
        "bot.yaml:1: name",
        "bot.yaml:3: model.nam",
        "bot.yaml:4: data.source",
        "bot.yaml:5: data.format",
        "bot.yaml:8: train.lora.rank",
        "bot.yaml:9: train.lora.alpha",
        "command line: 'serve.port=80': serve.port",
        "command line: 'train.seed=abc': train.seed",
    }
    with pytest.raises(ConfigError, match=r"^8 mistakes in bot.yaml"):
        load_chatbot("bot.yaml", ["serve.port=80", "train.seed=abc"])


def test_true_for_a_number_is_one_mistake_and_true_for_a_switch_is_none():
    assert load(f"{BOT}train:\n  lora:\n    use_rslora: true\n").train.lora.use_rslora
    assert mistakes(load, BOT, "serve.port=true") == [
        "command line: 'serve.port=true': serve.port: a number is wanted, not True. Port of the chat endpoint."
    ]


@pytest.mark.parametrize("value", ["5", "[1]"])
def test_a_setting_that_may_be_of_two_kinds_is_one_mistake(value):
    assert len(mistakes(load, f"{BOT}train:\n  lora:\n    target_modules: {value}\n")) == 1


def test_a_key_that_stands_twice_is_named_at_its_second_place():
    found = mistakes(load, f"{BOT}model:\n  name: a\n  name: b\nname: c\n")
    assert found == ["bot.yaml:6: model.name: stands twice", "bot.yaml:7: name: stands twice"]


def test_a_file_that_is_not_there_is_refused_with_the_nearest_preset():
    with pytest.raises(ConfigError) as refused:
        load_chatbot("configs/helpdsk.yaml")
    assert refused.value.what == "no config file configs/helpdsk.yaml"
    assert "configs/helpdesk.yaml" in refused.value.why
    assert refused.value.remedy == "configs/helpdesk.yaml"


def test_an_empty_file_lacks_what_has_no_default():
    for text in ("", "# nothing but a comment\n"):
        assert [entry.partition(" (")[0] for entry in mistakes(load, text)] == ["bot.yaml: name: is missing", "bot.yaml: data: is missing"]


@pytest.mark.parametrize("text", ["- name: bot\n", "just words\n", "42\n"])
def test_what_is_no_mapping_is_refused(text):
    with pytest.raises(ConfigError, match=r"bot.yaml is not a mapping of settings"):
        load(text)


@pytest.mark.parametrize(
    ("text", "line"),
    [("name: [\n", 2), ("name: bot\n\tdata: x\n", 2), ("name: bot\nmodel: *gone\n", 2), ("name: bot\n---\nname: b\n", 2), ("a: b: c\n", 1)],
)
def test_broken_yaml_is_refused_with_its_line(text, line):
    with pytest.raises(ConfigError, match=rf"(?s)bot.yaml is not YAML.*line {line}, column"):
        load(text)


def test_unreadable_files_are_refused():
    Path("bot.yaml").write_bytes("name: bücher".encode("latin-1"))
    for file in ("bot.yaml", "."):
        with pytest.raises(ConfigError, match="cannot read"):
            load_chatbot(file)


@pytest.mark.parametrize("value", ["!!python/object:os.system {}", "!!python/name:os.system", "2026-99-99", "!!bool maybe", "!!int ''"])
def test_values_that_yaml_cannot_make_are_mistakes_and_run_nothing(value):
    found = mistakes(load, f"{BOT}model:\n  revision: {value}\n")
    assert [entry for entry in found if entry.startswith("bot.yaml:5: model.revision: ")]


def test_a_value_that_contains_itself_is_a_mistake():
    with pytest.raises(ConfigError):
        load(f"{BOT}train: &again\n  lora: *again\n")


def test_anchors_are_followed():
    assert load(f"{BOT}model: {{name: &name some/model}}\ntrain: {{lora: {{target_modules: [*name]}}}}\n").train.lora.target_modules == [
        "some/model"
    ]


@pytest.mark.parametrize("override", ["train.lora.rank", "=8", "--rank=8", ""])
def test_an_override_of_the_wrong_form_is_refused(override):
    assert mistakes(load, BOT, override) == [f"command line: {override!r} is no setting; write dotted.path=value"]


def test_overrides_are_yaml_values_at_dotted_paths():
    config = load(
        f"{BOT}train:\n  num_epochs: 7\n",
        "train.learning_rate=1e-3",
        "train.lora.rank=32",
        "train.lora.target_modules=[q_proj, v_proj]",
        "train.max_steps=5",
        "train.gradient_checkpointing=true",
        "data.system_prompt=Say a=b, and no more.",
        "model.revision=null",
        "serve.max_num_seqs=1",
        "serve.max_num_seqs=2",
    )
    assert config.train.learning_rate == 0.001
    assert config.train.lora.rank == 32
    assert config.train.lora.target_modules == ["q_proj", "v_proj"]
    assert (config.train.max_steps, config.train.num_epochs, config.train.gradient_checkpointing) == (5, 7, True)
    assert config.data.system_prompt == "Say a=b, and no more."
    assert config.model.revision is None
    assert config.serve.max_num_seqs == 2, "the last one holds"


def test_an_override_that_yaml_cannot_make_is_the_text_itself():
    config = load(BOT, "model.revision=2026-99-99", "data.system_prompt=[Be brief.")
    assert (config.model.revision, config.data.system_prompt) == ("2026-99-99", "[Be brief.")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lora.rnak=8", "train.lora.rnak: no such setting; did you mean train.lora.rank?"),
        ("trian.lora.rank=8", "trian: no such setting; did you mean train?"),
        ("data.source.path=x", "data.source: input should be a valid string"),
    ],
)
def test_a_wrong_override_is_named_as_the_place(override, expected):
    found = mistakes(load, BOT, override)
    assert len(found) == 1
    assert found[0].startswith("command line: ")
    assert override in found[0]
    assert expected in found[0]


def test_base_model_name_of_the_environment_holds_over_the_file_and_under_the_command_line(monkeypatch):
    text = f"{BOT}model:\n  name: from/file\n"
    Path(".env").write_text("BASE_MODEL_NAME=from/env-file\n")
    assert load(text).model.name == "from/env-file"
    monkeypatch.setenv("BASE_MODEL_NAME", "from/environment")
    assert load(text).model.name == "from/environment"
    assert load(text, "model.name=from/command-line").model.name == "from/command-line"
    monkeypatch.setenv("BASE_MODEL_NAME", "")
    assert load(text).model.name == "from/env-file", "an empty variable is none"


def test_a_token_is_never_shown(monkeypatch):
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_secret")
    assert "hf_secret" not in repr(Environment())
    assert "hf_secret" not in load(BOT).model_dump_json()


UNSERVABLE = {
    "train.lora.use_dora=true": "train.lora.use_dora: vLLM cannot serve DoRA; use plain LoRA or use_rslora",
    "train.lora.modules_to_save=[lm_head]": "train.lora.modules_to_save: vLLM cannot serve fully trained modules; leave it empty",
    "train.lora.bias=all": "train.lora.bias=all: vLLM cannot serve trained biases; use none",
    "train.lora.rank=128": "train.lora.rank=128 is over serve.max_lora_rank=64; lower the one or raise the other",
    "data.max_length_tokens=4096": "data.max_length_tokens=4096 is over serve.max_model_len_tokens=2048",
    "train.early_stopping_patience=2": "train.early_stopping_patience=2 counts evaluations; set train.eval_every_steps too",
    "train.num_workers=3": "train.batch_size=16 must be a multiple of train.num_workers=3",
    "train.micro_batch_size=3": "train.micro_batch_size=3 must divide a worker's share of train.batch_size=16",
    "serve.max_cpu_loras=3": "must be at least",
}


@pytest.mark.parametrize("override", UNSERVABLE)
def test_what_could_not_be_served_or_shared_out_is_refused_with_the_reason(override):
    found = mistakes(load, BOT, override)
    assert len(found) == 1
    assert UNSERVABLE[override] in found[0]


@pytest.mark.parametrize("override", UNSERVABLE)
def test_what_could_not_be_served_or_shared_out_is_named_with_its_place(override):
    assert mistakes(load, BOT, override)[0].startswith(f"command line: '{override}'")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("train:\n  num_workers: 3\n  lora:\n    rank: 128\n", [5, 7]),
        ("train:\n  num_workers: 1\n  lora:\n    use_dora: true\n    bias: all\n", [7, 8]),
    ],
)
def test_each_reason_is_a_mistake_of_its_own_with_its_own_line(text, lines):
    assert sorted(entry.partition(": ")[0] for entry in mistakes(load, BOT + text)) == [f"bot.yaml:{line}" for line in lines]


def test_micro_batches_must_divide_a_workers_share_not_the_whole_batch():
    assert load(BOT, "train.num_workers=2", "train.micro_batch_size=8").train.micro_batch_size == 8
    assert mistakes(load, BOT, "train.num_workers=2", "train.micro_batch_size=16")


@pytest.mark.parametrize("name", ["Helpdesk", "a b", "-a", "a-", "a:1", "a/b", "", "a" * 65, "a\n"])
def test_names_that_no_request_could_carry_are_refused(name):
    assert " name: " in mistakes(load, f"name: {name!r}\ndata: {{source: x}}\n".replace("'a\\n'", '"a\\n"'))[0]


def test_configs_are_frozen():
    for config in (load(BOT), load_machine()):
        with pytest.raises(ValidationError, match="frozen"):
            config.__setattr__(next(iter(type(config).model_fields)), "other")


def test_every_setting_says_what_it_is():
    for model in (ChatbotConfig, MachineConfig):
        assert [path for path, info in setting_paths(model) if not (info.description or "").endswith(".")] == []


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_preset_loads(file):
    assert load_chatbot(file).name


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "machines").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_machine_loads_by_file_and_by_name(file):
    assert load_machine(file) == load_machine(file.stem)


def test_the_desk_of_two_cards_trains_on_the_larger():
    cards = load_machine("rtx5090_5060ti").cards
    assert [(card.pool, card.gpu) for card in cards] == [("serve", "RTX 5060 Ti"), ("train", "RTX 5090")]


@pytest.mark.parametrize("name", ["auot", "elsewhere/auot"])
def test_an_unknown_machine_is_refused_with_those_there_are(name):
    with pytest.raises(ConfigError, match=r"(?s)no machine named.*auto, kubernetes, rtx5090_5060ti"):
        load_machine(name)


def test_a_machine_file_that_is_not_there_is_refused_with_machines_not_chatbots():
    with pytest.raises(ConfigError, match=r"(?s)desk.yaml.*auto, kubernetes, rtx5090_5060ti") as refused:
        load_machine("desk.yaml")
    assert "helpdesk" not in str(refused.value)


def test_a_machine_needs_both_pools():
    for text in ("cards: []\n", "cards:\n  - pool: serve\n", "cards:\n  - pool: train\n  - pool: train\n"):
        assert mistakes(load_desk, text) == ["desk.yaml:1: cards: at least one card of each pool is needed, serve and train"]


@pytest.mark.parametrize(
    "override", ["cards=[]", "storage=some/folder", "storage=s3://bucket/a?b=c", "ray_port=16379", "listen_host=0.0.0.0"]
)
def test_what_does_not_fit_together_is_said_where_it_was_given(override):
    with pytest.raises(ConfigError, match=rf"(?s)command line: '{re.escape(override)}': {override.partition('=')[0]}"):
        load_machine("auto", [override])


def test_a_mistake_in_a_card_is_one_mistake_with_its_line():
    assert mistakes(load_desk, "cards:\n  - pool: serve\n  - gpu: RTX 5090\n    pool: trian\n") == [
        "desk.yaml:4: cards.1.pool: input should be 'serve' or 'train', not 'trian'"
    ]


def test_a_gpu_may_be_named_by_its_number():
    cards = load_desk("cards:\n  - {pool: serve, gpu: 0}\n  - {pool: train, gpu: 1}\n").cards
    assert [card.gpu for card in cards] == ["0", "1"]


def test_two_services_cannot_listen_on_one_port():
    assert "5000" in mistakes(load_desk, "ray_port: 5000\nmlflow_port: 5000\n")[0]


def test_errors_say_what_why_and_what_to_do():
    assert str(TandemError("what", "why", "remedy")) == "what\nwhy\nTry: remedy"
    assert str(TandemError("what")) == "what"


def test_a_config_that_was_read_before_takes_overrides_and_names_where_it_came_from():
    config = load("name: bot\ndata: {source: a.jsonl}\n")
    assert with_overrides(config, [], "helpdesk:1") is config
    assert with_overrides(config, ["gate.metrics.accuracy.minimum=0.5"], "helpdesk:1").gate.metrics["accuracy"].minimum == 0.5
    with pytest.raises(ConfigError, match="one mistake in helpdesk:1"):
        with_overrides(config, ["serve.prot=9000"], "helpdesk:1")
