"""The stack on a real GPU: cards, LoRA and QLoRA on the tiny model, and an engine that answers and sleeps; skipped where there is none."""

import json
from contextlib import closing

import pytest

from cluster.cards import find_gpus
from cluster.job_queue import Queue
from tests.ray.conftest import config, stack, tiny_model  # noqa: F401 (fixtures)
from tests.ray.stack import Stack, wait_for
from tests.ray.test_7_queue import job, submit

pytestmark = pytest.mark.skipif(not find_gpus(), reason="this machine has no GPU")


def test_the_cards_are_gpus_of_both_pools(stack: Stack):  # noqa: F811
    cards = json.loads((stack.home / "cluster.json").read_text())["cards"]
    assert {card["pool"] for card in cards} == {"serve", "train"}
    assert all(card["accelerator"] != "cpu" for card in cards)


@pytest.mark.parametrize(
    "setting",
    ["train.quantization=none", "train.quantization=nf4", "train.precision=fp8", "train.packing=true", "train.compile=true"],
)
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


def test_an_engine_that_slept_says_the_same_with_and_without_an_adapter(stack: Stack, config, tiny_model):  # noqa: F811
    """Its weights were in the machine's memory meanwhile, and a job in their place."""
    stack.serve(config, "serve.scaling.use_train_cards=false")
    names = tiny_model.name, stack.registry.versions()[-1].name

    def answers() -> list[str]:
        asked = [stack.ask(name, timeout_s=240, max_tokens=24).json() for name in names]
        return [answer["choices"][0]["message"]["content"] for answer in asked]

    before = answers()
    num_cards = len(json.loads((stack.home / "cluster.json").read_text())["cards"])
    jobs = [submit(stack, config, "train.max_steps=100000", f"name=long{number}") for number in range(num_cards)]
    wait_for(lambda: all(job(stack, number).num_steps for number in jobs), timeout_s=240)
    with closing(Queue(stack.home / "queue.db")) as queue:
        assert any("goes to sleep" in what for _, _, what, _ in queue.handovers(20))
    assert answers() == before
    for number in jobs:
        assert stack.run("cluster", "cancel", str(number)).returncode == 0
