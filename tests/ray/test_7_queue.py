"""The line of jobs on a real cluster: who waits and why, who is called back, and an arbiter that is killed; on a tiny model."""

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

import httpx
import pytest

from cluster.job_queue import CANCELLED, DONE, FAILED, RUNNING, STANDING, WAITING, Queue, QueuedJob
from configs.cli import JOB_VARIABLE
from configs.errors import ClusterError
from tests.ray.stack import Stack, wait_for
from tests.ray.test_5_tune import num_looks

SUBMITTED = re.compile(r"job (\d+)")


@pytest.fixture(scope="module")
def chat(stack: Stack, config, served, secret, tiny_model) -> Callable[[], int]:
    """Asks chat, whose one engine has the serve card."""
    stack.serve(config, "serve.scaling.min_replicas=1", "serve.scaling.use_train_cards=false")
    return lambda: stack.ask(tiny_model.name, secret=secret, timeout_s=240, max_tokens=1).status_code


@contextmanager
def asked_all_the_time(chat: Callable[[], int], every_s: float = 1.0) -> Iterator[None]:
    """Let chat have no quiet, so that it lends nothing: that takes 5 s here."""
    over = threading.Event()

    def ask() -> None:
        while not over.wait(every_s):
            with suppress(httpx.HTTPError):
                chat()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join()


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


def handovers(stack: Stack) -> list[str]:
    """What was done with cards, the newest first."""
    with closing(Queue(stack.home / "queue.db")) as queue:
        return [what for _, _, what, _ in queue.handovers(100)]


@pytest.fixture(autouse=True)
def empty_line(stack: Stack) -> Iterator[None]:
    """Cancels what a test left in line, also where it failed: the next one wants its cards."""
    yield
    with closing(Queue(stack.home / "queue.db")) as queue:
        for left in queue.jobs(*STANDING):
            with suppress(ClusterError):  # it has ended meanwhile
                queue.cancel(left.id)
        wait_for(lambda: not queue.jobs(*STANDING))


def arbiters(stack: Stack) -> list[int]:
    return [process.pid for process in stack.parts("python", "cluster.arbitrate")]


def train_workers(stack: Stack, card: str) -> set[int]:
    """The processes on a card that train, or will."""
    raylets = {raylet.pid for raylet in stack.parts("raylet", card)}
    return {worker.pid for worker in stack.workers("ray::RayTrainWorker") if worker.ppid() in raylets}


def test_a_line_of_jobs_goes_on_by_itself_whoever_leaves_or_is_killed(stack: Stack, config, both_cards, chat):
    """A sweep makes room for a run, that for one that goes before it; arbiter and drivers are killed, and nothing is forgotten."""
    with asked_all_the_time(chat):
        space = ("tune.space={train.lora.rank: {choice: [1, 2]}}", "train.max_steps=400", "tune.num_looks=8", "tune.scheduler=grid")
        sweep = submit(stack, config, "--sweep", "name=swept", *space)
        wait_for(lambda: (run_id := job(stack, sweep).run_id) and num_looks(stack, run_id), timeout_s=240)
        low = submit(stack, config, both_cards, "train.max_steps=100000", "train.checkpoint_every_steps=20", "name=low")
        third = submit(stack, config, both_cards, "name=third")
        wait_for(lambda: f"card1 busy with job {low}" in job(stack, third).reason)
        assert job(stack, sweep).state == WAITING
        (arbiter,) = arbiters(stack)
        os.kill(arbiter, signal.SIGKILL)
        shown = stack.run("cluster", "queue").stdout
        assert re.search(rf"{third}\s+train\s+third\s+0\s+waiting .*card1 busy with job {low}", shown), shown
        assert stack.run("cluster", "cancel", str(third)).returncode == 0
        assert job(stack, third).state == CANCELLED
        wait_for(lambda: arbiters(stack) and arbiter not in arbiters(stack))

        wait_for(lambda: job(stack, low).num_steps, timeout_s=240)
        urgent = submit(stack, config, both_cards, "--priority", "1", "name=urgent")
        ended = wait_for(lambda: (now := job(stack, urgent)).state not in STANDING and now, timeout_s=240)
        assert (ended.state, ended.num_lost) == (DONE, 0)
        assert "registered as urgent:1" in ended.reason
        left = job(stack, low)
        assert list((stack.home / "runs" / left.run_id).glob("checkpoint_*/")), "it saved its state"
        wait_for(lambda: job(stack, low).num_steps, timeout_s=240)
        steps = [metric.step for metric in stack.registry.client.get_metric_history(left.run_id, "loss")]
        assert sorted(steps) == list(range(1, len(steps) + 1)), "it went on from where it was"

        for num_lost in (1, 2, 3):
            (driver,) = wait_for(lambda: job(stack, low).state == RUNNING and stack.parts("python", f"queue/{low}.yaml"))
            assert driver.cmdline()[-2:] == ["--resume", left.run_id]
            driver.kill()
            wait_for(lambda: job(stack, low).num_lost == num_lost)  # noqa: B023 (it is asked at once)
        assert job(stack, low).state == FAILED
        assert "begun 3 times (lending.max_attempts)" in job(stack, low).reason

        ended = wait_for(lambda: (now := job(stack, sweep)).state not in STANDING and now, timeout_s=240)
        assert (ended.state, ended.num_lost) == (DONE, 0)
        assert "the candidate" in ended.reason


def test_a_job_that_had_ended_when_its_cluster_was_killed_is_done(stack: Stack, config, guide, monkeypatch):
    monkeypatch.setenv(JOB_VARIABLE, "1")
    done = stack.run("train", str(config), "--resume", guide.run_id)
    assert done.returncode == 0, done.stderr
    assert "had ended before" in done.stdout
    monkeypatch.delenv(JOB_VARIABLE)
    assert stack.run("train", str(config), "--resume", guide.run_id).returncode == 2, "for others there is nothing left to do"


def test_quiet_chat_lends_its_card_and_a_request_gets_it_back_and_its_answer(stack: Stack, config, both_cards, chat):
    """The engine sleeps meanwhile, and is the same one afterwards; `stop` is Serve's own growth from zero, of which test_5_scaling is."""
    assert chat() == 200
    (core,) = stack.parts("", "EngineCore")
    with asked_all_the_time(chat, every_s=2.6):  # in its pauses the next job may get ready
        long = submit(stack, config, both_cards, "train.max_steps=100000", "name=long")
        guest = submit(stack, config, "train.max_steps=100000", "name=guest")
        (early,) = wait_for(lambda: stack.parts("python", f"queue/{guest}.yaml"))
        assert job(stack, guest).state == WAITING, "its process gets ready while it waits"
        assert re.search(rf"tandem-{guest}-\w+ +waits for cards", stack.run("cluster", "status").stdout)
        standing_by = wait_for(lambda: train_workers(stack, "card0"))
    started = wait_for(lambda: (now := job(stack, guest)).num_steps and now, timeout_s=180)
    assert started.cards == ("card0",)
    assert "lent by chat" in started.reason
    assert stack.parts("python", f"queue/{guest}.yaml") == [early]
    assert train_workers(stack, "card0") == standing_by, "its worker was there"
    assert re.search(rf"card0\s+serve .*job {guest} \(guest\), running .*lent by chat", stack.run("cluster", "status").stdout)
    assert "the engine on card0 goes to sleep" in handovers(stack)
    assert chat() == 200
    assert [found.pid for found in stack.parts("", "EngineCore")] == [core.pid], "it was woken, and not begun anew"
    wait_for(lambda: f"job {guest} left: {WAITING}" in handovers(stack))  # and perhaps it has the card again: chat is quiet
    assert list((stack.home / "runs" / started.run_id).glob("checkpoint_*/")), "it goes on from where it was"
    with asked_all_the_time(chat, every_s=2.6):
        wait_for(lambda: job(stack, guest).state == WAITING)
        standing_by = wait_for(lambda: train_workers(stack, "card0"))
        for pid in standing_by:
            os.kill(pid, signal.SIGKILL)
    again = wait_for(lambda: (now := job(stack, guest)).state == RUNNING and now.step > started.step and now, timeout_s=180)
    assert again.num_lost == 0
    assert standing_by.isdisjoint(train_workers(stack, "card0")), "another one is started where it died"
    assert stack.run("cluster", "cancel", str(long)).returncode == 0
    left = wait_for(lambda: (now := job(stack, long)).state == CANCELLED and now)
    assert stack.registry.client.get_run(left.run_id).info.status == "KILLED"
