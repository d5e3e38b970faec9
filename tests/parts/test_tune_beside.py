"""When trials share a base on a card: where the config says so, or where it pays and memory reaches, and never where they could not."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from configs.errors import RunError
from configs.loader import ROOT
from configs.schema import ChatbotConfig
from data.prepare import Prepared
from train.memory import MAX_BATCH_TOKENS, MOST_OF_BASE, Memory, outline
from tune.beside import MAX_TOKENS, NUM_TRIALS, Sharing, choose_sharing

RANK = {"train.lora.rank": {"choice": [4, 16]}}
ALONE = Sharing()
BATCH = 4
MEASURED = re.compile(r"sweep_(lora|nf4)_8b_(\d+)x(\d+)(_recomputed)?_memory_of_base")


def make_base(folder: Path, **settings: object) -> Path:
    """Write what says how large a base is; its shape is that of the benchmark's, in which memory was measured."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    LlamaConfig(vocab_size=49152, **(shape | settings)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def config(space: dict[str, object], trials_per_card: int | None = None, **train: object) -> ChatbotConfig:
    tune = {"space": space, "trials_per_card": trials_per_card}
    return ChatbotConfig.model_validate({"name": "bot", "data": {"source": "x"}, "train": {"batch_size": BATCH, **train}, "tune": tune})


def data(tokens_a_row: int) -> Prepared:
    return Prepared(Path(), 10, 2, 10 * tokens_a_row, 50, 0, 0, 0, 0, 0, 99, 50, "fingerprint")


def test_what_is_reckoned_of_memory_is_no_less_than_what_was_measured(base):
    (*_, newest) = sorted((ROOT / "tests/benchmarks/results").glob("sweep-shared-base-h100-*.json"))
    figures = json.loads(newest.read_text())["figures"]
    found = {match: value for name, value in figures.items() if (match := MEASURED.fullmatch(name))}
    assert len(found) == 10
    for match, measured in found.items():
        kind, num_rows, longest, recompute = match.groups()
        num_tokens = min(MAX_BATCH_TOKENS, NUM_TRIALS * int(num_rows) * 0.75 * int(longest))
        memory = Memory(outline(base), NUM_TRIALS, 16, "nf4" if kind == "nf4" else "none", bool(recompute))
        assert measured <= memory.share(num_tokens) <= 1.2 * measured, match[0]
        assert memory.most_tokens == 0 or memory.share(memory.most_tokens) == pytest.approx(MOST_OF_BASE, abs=1e-3)


def test_small_steps_share_a_gpu_by_themselves_within_the_bound_of_memory(base):
    shared = choose_sharing(config(RANK), data(20), base, on_gpu=True)
    assert (shared.num_trials, shared.recompute) == (NUM_TRIALS, False)
    assert NUM_TRIALS * BATCH * 20 <= shared.max_batch_tokens < MAX_BATCH_TOKENS, "longer rows than on average go in several passes"
    shared = choose_sharing(config(RANK), data(96), base, on_gpu=True)
    assert (shared.num_trials, shared.recompute) == (NUM_TRIALS, True), "it takes 1.9 times the base as it is, and 1.2 recomputed"
    assert choose_sharing(config(RANK), data(96), base, on_gpu=False) == ALONE


def test_large_steps_and_what_memory_may_not_hold_stay_apart(base, tmp_path):
    assert choose_sharing(config(RANK), data(MAX_TOKENS // BATCH + 1), base, on_gpu=True) == ALONE
    assert choose_sharing(config(RANK), data(MAX_TOKENS // BATCH), base, on_gpu=True) == ALONE, "8,192 tokens in one pass"
    assert choose_sharing(config(RANK, micro_batch_size=1), data(MAX_TOKENS // BATCH), base, on_gpu=True).num_trials == NUM_TRIALS
    assert choose_sharing(config(RANK, quantization="nf4"), data(20), base, on_gpu=True) == ALONE, "a third of the base, as much beside it"
    small = make_base(tmp_path, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
    assert choose_sharing(config(RANK), data(20), small, on_gpu=True) == ALONE


@pytest.mark.parametrize(
    "space",
    [
        {"train.lora.rank": {"integer": [4, 64]}},
        {"train.batch_size": {"choice": [4, 64]}},
        {"train.micro_batch_size": {"choice": [2, None]}, "train.batch_size": {"choice": [32]}},
    ],
)
def test_the_largest_of_a_space_counts(space, base):
    assert choose_sharing(config(RANK), data(60), base, on_gpu=True).num_trials == NUM_TRIALS
    assert choose_sharing(config(space), data(60), base, on_gpu=True) == ALONE


def test_the_config_decides_where_it_says_something(tmp_path):
    assert choose_sharing(config(RANK, 3), data(5000), tmp_path, on_gpu=False) == replace(ALONE, num_trials=3)
    assert choose_sharing(config(RANK, 1), data(5), tmp_path, on_gpu=True) == ALONE


def test_a_base_that_cannot_be_shared_keeps_trials_apart_that_would_share_by_themselves(tmp_path):
    assert choose_sharing(config(RANK), data(20), make_base(tmp_path, attention_dropout=0.1), on_gpu=True) == ALONE
    assert choose_sharing(config(RANK), data(20), tmp_path / "gone", on_gpu=True) == ALONE


@pytest.mark.parametrize(
    ("space", "train"),
    [
        ({"train.quantization": {"choice": ["none", "nf4"]}}, {}),
        ({"train.lora.dropout": {"choice": [0.0, 0.1]}}, {}),
        ({"train.optimizer_bits": {"choice": [32, 8]}}, {}),
        ({"train.compile": {"choice": [True, False]}}, {}),
        ({"data.max_length_tokens": {"choice": [64, 128]}}, {}),
        (RANK, {"lora": {"dropout": 0.1}}),
    ],
)
def test_what_the_base_cannot_give_to_each_keeps_them_apart(space, train, base):
    assert choose_sharing(config(space, **train), data(5), base, on_gpu=True) == ALONE
    with pytest.raises(RunError, match="trials_per_card=2"):
        choose_sharing(config(space, 2, **train), data(5), base, on_gpu=True)
