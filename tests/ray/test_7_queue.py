"""The line of jobs on a real cluster: who waits and why, who is called back, and an arbiter that is killed; on a tiny model."""

import json
import re
import signal
from contextlib import closing

import psutil
import pytest

from cluster.job_queue import CANCELLED, DONE, LEAVING, RUNNING, WAITING, Queue, QueuedJob
from tests.ray.stack import Stack, wait_for

SUBMITTED = re.compile(r"job (\d+)")


@pytest.fixture
def both_cards(stack: Stack) -> str:
    """A job for all train cards, so that the next one has to wait."""
    cards = json.loads((stack.home / "cluster.json").read_text())["cards"]
    return f"train.num_workers={sum(card['pool'] == 'train' for card in cards)}"


def submit(stack: Stack, config, *words: str) -> int:
    done = stack.run("cluster", "submit", str(config), *words)
    assert done.returncode == 0, done.stderr
    return int(SUBMITTED.search(done.stdout)[1])


def job(stack: Stack, number: int) -> QueuedJob:
    with closing(Queue(stack.home / "queue.db")) as queue:
        return queue.find(number)


def arbiter(stack: Stack) -> psutil.Process:
    return next(process for process in stack.workers("cluster.arbitrate") if "python" in process.name())


def test_jobs_wait_with_a_reason_start_by_themselves_and_an_arbiter_that_is_killed_forgets_nothing(stack: Stack, config, both_cards):
    first = submit(stack, config, both_cards, "train.max_steps=60", "train.checkpoint_every_steps=60", "name=first")
    second = submit(stack, config, both_cards, "train.max_steps=4000", "name=second")
    third = submit(stack, config, both_cards, "name=third")
    wait_for(lambda: job(stack, first).state == RUNNING)
    wait_for(lambda: f"job {first}" in job(stack, second).reason)
    before = arbiter(stack)
    before.send_signal(signal.SIGKILL)
    shown = stack.run("cluster", "queue").stdout
    assert re.search(rf"{second}\s+train\s+second\s+0\s+waiting .*card1 busy with job {first}", shown), shown
    assert stack.run("cluster", "cancel", str(third)).returncode == 0
    assert job(stack, third).state == CANCELLED
    ended = wait_for(lambda: (now := job(stack, first)).state not in (WAITING, RUNNING) and now, timeout_s=180)
    assert ended.state == DONE
    assert "registered as first:1" in ended.reason
    assert ended.num_lost == 0
    assert arbiter(stack).pid != before.pid
    wait_for(lambda: job(stack, second).num_steps)
    assert stack.run("cluster", "cancel", str(second)).returncode == 0
    assert job(stack, second).state in (LEAVING, CANCELLED)
    left = wait_for(lambda: (now := job(stack, second)).state == CANCELLED and now)
    assert list((stack.home / "runs" / left.run_id).glob("checkpoint_*/")), "it saved its state"
    assert stack.registry.client.get_run(left.run_id).info.status == "KILLED"
    done = stack.run("cluster", "cancel", str(second))
    assert done.returncode == 2
    assert f"job {second} has ended" in done.stderr


def test_quiet_chat_lends_its_card_and_a_request_gets_it_back_and_its_answer(stack: Stack, config, both_cards, served, secret, tiny_model):
    stack.serve(config, "serve.scaling.min_replicas=1", "serve.scaling.use_train_cards=false")
    assert stack.ask(tiny_model.name, secret=secret).status_code == 200
    long = submit(stack, config, both_cards, "train.max_steps=100000", "name=long")
    guest = submit(stack, config, "train.max_steps=100000", "name=guest")
    started = wait_for(lambda: (now := job(stack, guest)).num_steps and now, timeout_s=180)
    assert started.cards == ("card0",)
    assert "lent by chat" in started.reason
    assert re.search(rf"card0\s+serve .*job {guest} \(guest\), running .*lent by chat", stack.run("cluster", "status").stdout)
    answer = stack.ask(tiny_model.name, secret=secret, timeout_s=240)
    assert answer.status_code == 200, answer.text
    left = job(stack, guest)
    assert left.state == WAITING
    assert list((stack.home / "runs" / left.run_id).glob("checkpoint_*/")), "it goes on from where it was"
    for number in (guest, long):
        assert stack.run("cluster", "cancel", str(number)).returncode == 0
    wait_for(lambda: job(stack, long).state == CANCELLED)
