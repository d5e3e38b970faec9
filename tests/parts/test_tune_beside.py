"""When trials share a base on a card: where the config says so, or where it pays, and never where they could not."""

from pathlib import Path

import pytest

from configs.errors import RunError
from configs.schema import ChatbotConfig
from data.prepare import Prepared
from tune.beside import MAX_TOKENS, NUM_TRIALS, count_beside

RANK = {"train.lora.rank": {"choice": [4, 8]}}


def config(space: dict[str, object], trials_per_card: int | None = None, **train: object) -> ChatbotConfig:
    tune = {"space": space, "trials_per_card": trials_per_card}
    return ChatbotConfig.model_validate({"name": "bot", "data": {"source": "x"}, "train": {"batch_size": 4, **train}, "tune": tune})


def data(tokens_a_row: int) -> Prepared:
    return Prepared(Path(), 10, 2, 10 * tokens_a_row, 50, 0, 0, 0, 0, 0, 99, 50, "fingerprint")


def test_small_steps_share_a_gpu_by_themselves():
    small, large = data(MAX_TOKENS // 4), data(MAX_TOKENS // 4 + 1)
    assert [count_beside(config(RANK), small, on_gpu) for on_gpu in (True, False)] == [NUM_TRIALS, 1]
    assert count_beside(config(RANK), large, on_gpu=True) == 1


def test_the_config_decides_where_it_says_something():
    assert count_beside(config(RANK, 3), data(5000), on_gpu=False) == 3
    assert count_beside(config(RANK, 1), data(5), on_gpu=True) == 1


@pytest.mark.parametrize(
    ("space", "train"),
    [
        ({"train.quantization": {"choice": ["none", "nf4"]}}, {}),
        ({"train.lora.dropout": {"choice": [0.0, 0.1]}}, {}),
        ({"data.max_length_tokens": {"choice": [64, 128]}}, {}),
        (RANK, {"lora": {"dropout": 0.1}}),
    ],
)
def test_what_the_base_cannot_give_to_each_keeps_them_apart(space, train):
    assert count_beside(config(space, **train), data(5), on_gpu=True) == 1
    with pytest.raises(RunError, match="trials_per_card=2"):
        count_beside(config(space, 2, **train), data(5), on_gpu=True)
