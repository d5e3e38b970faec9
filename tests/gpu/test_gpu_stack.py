"""The stack on a real GPU: cards, LoRA and QLoRA on the tiny model, and an engine that answers; skipped where there is none."""

import json

import pytest

from cluster.cards import find_gpus
from tests.ray.conftest import config, stack, tiny_model  # noqa: F401 (fixtures)
from tests.ray.stack import Stack

pytestmark = pytest.mark.skipif(not find_gpus(), reason="this machine has no GPU")


def test_the_cards_are_gpus_of_both_pools(stack: Stack):  # noqa: F811
    cards = json.loads((stack.home / "cluster.json").read_text())["cards"]
    assert {card["pool"] for card in cards} == {"serve", "train"}
    assert all(card["accelerator"] != "cpu" for card in cards)


@pytest.mark.parametrize("setting", ["train.quantization=none", "train.quantization=nf4", "train.precision=fp8"])
def test_a_run_trains_on_the_gpu_and_registers(stack: Stack, config, setting):  # noqa: F811
    if "fp8" in setting and not all(gpu.has_fp8 for gpu in find_gpus()):
        pytest.skip("a GPU here has no FP8")
    version = stack.train(config, setting)
    scores = json.loads(version.tags["scores"])
    assert scores["peak_memory_gib"] > 0
    losses = stack.losses(version.run_id)
    assert losses[max(losses)] < losses[1]


def test_the_engine_answers_with_base_and_adapter(stack: Stack, config, tiny_model):  # noqa: F811
    stack.serve(config)
    newest = stack.registry.versions()[-1].name
    assert stack.ask(tiny_model.name).status_code == 200
    assert stack.ask(newest).json()["model"] == newest
