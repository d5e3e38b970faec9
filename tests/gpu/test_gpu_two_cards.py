"""Two real GPUs, a card each: every process sees its own, and gives its memory back as it leaves; skipped where there are fewer."""

import json
import subprocess
from collections import defaultdict

import psutil
import pytest

from cluster.cards import find_gpus
from tests.ray.conftest import config, served, stack, tiny_model  # noqa: F401 (fixtures)
from tests.ray.stack import Stack, wait_for
from tests.ray.test_7_queue import job, submit

pytestmark = pytest.mark.skipif(len(find_gpus()) < 2, reason="this machine has fewer than two GPUs")

SPARE_MIB = 64  # what a driver counts for a GPU on which nobody is


def ask_driver(what: str) -> list[list[str]]:
    answer = subprocess.run(["nvidia-smi", f"--query-{what}", "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True)
    return [[part.strip() for part in line.split(",")] for line in answer.stdout.strip().splitlines()]


def used_mib() -> dict[str, int]:
    """Memory in use, by the GPU's number."""
    return {number: int(used) for number, used in ask_driver("gpu=index,memory.used")}


def gpus_by_card(stack: Stack) -> dict[str, set[str]]:  # noqa: F811
    """The GPUs on which processes of each card compute, as the driver tells."""
    numbers = {uuid: number for number, uuid in ask_driver("gpu=index,uuid")}
    raylets = {raylet.pid: card for card in cards(stack) for raylet in stack.parts("raylet", card)}
    found = defaultdict(set)
    for uuid, pid in ask_driver("compute-apps=gpu_uuid,pid"):
        for above in psutil.Process(int(pid)).parents():
            if above.pid in raylets:
                found[raylets[above.pid]].add(numbers[uuid])
    return dict(found)


def cards(stack: Stack) -> dict[str, str]:  # noqa: F811
    """The GPU of each card, as `up` gave it."""
    names = [card["card"] for card in json.loads((stack.home / "cluster.json").read_text())["cards"]]
    return {name: stack.parts("raylet", name)[0].environ()["CUDA_VISIBLE_DEVICES"] for name in names}


def test_each_process_has_its_cards_gpu_alone_and_leaves_nothing_there(stack: Stack, config):  # noqa: F811
    gpu_of = cards(stack)
    pools = {card["pool"]: card["card"] for card in json.loads((stack.home / "cluster.json").read_text())["cards"]}
    before = used_mib()
    stack.serve(config, "serve.scaling.use_train_cards=false")
    number = submit(stack, config, "train.max_steps=100000", "name=long")
    wait_for(lambda: job(stack, number).num_steps and job(stack, number).step > 1, timeout_s=240)
    assert gpus_by_card(stack) == {card: {gpu} for card, gpu in gpu_of.items()}, "an engine on one, a worker on the other"
    assert job(stack, number).cards == (pools["train"],)
    assert stack.run("cluster", "cancel", str(number)).returncode == 0
    train_gpu = gpu_of[pools["train"]]
    wait_for(lambda: used_mib()[train_gpu] <= before[train_gpu] + SPARE_MIB, timeout_s=60)


def test_a_lent_cards_engine_sleeps_and_both_gpus_train(stack: Stack, config, tiny_model):  # noqa: F811
    gpu_of = cards(stack)
    stack.serve(config, "serve.scaling.use_train_cards=false")
    assert stack.ask(tiny_model.name).status_code == 200
    number = submit(stack, config, "train.max_steps=100000", "train.num_workers=2", "name=wide")
    wait_for(lambda: job(stack, number).num_steps and job(stack, number).step > 1, timeout_s=240)
    assert gpus_by_card(stack) == {card: {gpu} for card, gpu in gpu_of.items()}
    assert stack.ask(tiny_model.name, timeout_s=240).status_code == 200, "the card is called back for it"
    assert stack.run("cluster", "cancel", str(number)).returncode == 0
