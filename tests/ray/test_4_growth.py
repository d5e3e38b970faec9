"""More engines in a burst, fewer in quiet, none at rest: and no request that fails on the way."""

import re
import threading
import time
from collections import Counter

import pytest

from tests.ray.stack import Stack, wait_for

NUM_AT_ONCE = 4
PAUSE_S = 0.2  # between requests: the second engine must start on the cores that the first one has
SCALING = {
    "min_replicas": 0,
    "max_replicas": 2,
    "requests_per_replica": 1,
    "up_after_s": 1,
    "down_after_s": 15,
}


@pytest.fixture(scope="module")
def secret(stack: Stack) -> str:
    return stack.make_key("growth")


def num_replicas(stack: Stack) -> int:
    return len(stack.workers("ServeReplica"))


def test_a_burst_grows_it_quiet_shrinks_it_to_nothing_and_a_request_wakes_it(stack: Stack, config, secret, tiny_model):
    anywhere = "serve.scaling.use_train_cards=true"
    assert stack.run("serve", str(config), anywhere).returncode == 0
    (first,) = stack.workers("ServeReplica")
    done = stack.run("serve", str(config), anywhere, *(f"serve.scaling.{name}={value}" for name, value in SCALING.items()))
    assert done.returncode == 0, done.stdout + done.stderr
    statuses: Counter[int] = Counter()
    grown = threading.Event()

    def again(number: int) -> None:
        while not grown.is_set():
            statuses[stack.ask(tiny_model.name, f"What is number {number}?", secret=secret, max_tokens=64).status_code] += 1
            time.sleep(PAUSE_S)

    threads = [threading.Thread(target=again, args=(number,)) for number in range(NUM_AT_ONCE)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: num_replicas(stack) == 2, timeout_s=120)
        wait_for(lambda: num_answering(stack) == 2, timeout_s=240)
        assert first.pid in [process.pid for process in stack.workers("ServeReplica")], "more engines are no reason to restart one"
    finally:
        grown.set()
        for thread in threads:
            thread.join()
    wait_for(lambda: num_replicas(stack) == 0, timeout_s=240)
    assert set(statuses) == {200}, statuses
    answer = stack.ask(tiny_model.name, secret=secret, timeout_s=240)
    assert answer.status_code == 200, answer.text


def num_answering(stack: Stack) -> int:
    """How many engines Serve takes for running."""
    found = re.search(r"(\d) running", stack.run("serve", "status").stdout)
    return int(found[1]) if found else 0
