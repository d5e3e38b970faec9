"""More engines in a burst, fewer in quiet, none at rest, and no request that fails on the way; `test_7_queue` wakes one."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx

from tests.ray.stack import Stack, wait_for

NUM_AT_ONCE = 4
UPLOAD_S = 5.0  # a body that comes slowly: in flight, without taking the cores on which the second engine starts
SCALING = {"min_replicas": 0, "max_replicas": 2, "requests_per_replica": 1, "up_after_s": 1, "down_after_s": 5}


def num_replicas(stack: Stack) -> int:
    return len(stack.workers("ServeReplica"))


def test_a_burst_grows_it_and_quiet_shrinks_it_to_nothing(stack: Stack, config, served, secret, tiny_model):
    (first,) = stack.workers("ServeReplica")
    statuses: Counter[int] = Counter()
    grown = threading.Event()

    def again(number: int) -> None:
        while not grown.is_set():
            statuses[ask_slowly(stack, tiny_model.name, secret, f"What is number {number}?")] += 1

    threads = [threading.Thread(target=again, args=(number,)) for number in range(NUM_AT_ONCE)]
    for thread in threads:
        thread.start()
    try:
        # The burst is there first, or in quiet the only engine would leave.
        stack.serve(config, *(f"serve.scaling.{name}={value}" for name, value in SCALING.items()))
        wait_for(lambda: num_replicas(stack) == 2, timeout_s=120)
        wait_for(lambda: num_running(stack) == 2, timeout_s=240)
        assert "2 running" in stack.run("serve", "status").stdout
        assert first.pid in [process.pid for process in stack.workers("ServeReplica")], "more engines are no reason to restart one"
    finally:
        grown.set()
        for thread in threads:
            thread.join()
    wait_for(lambda: num_replicas(stack) == 0, timeout_s=240)
    assert set(statuses) == {200}, statuses
    assert "the next request wakes one" in stack.run("serve", "status").stdout


def ask_slowly(stack: Stack, model: str, secret: str, text: str) -> int:
    """Ask in pieces, and return the status of the answer."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8}).encode()

    def pieces() -> Iterator[bytes]:
        yield body[:10]
        time.sleep(UPLOAD_S)
        yield body[10:]

    headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
    return httpx.post(f"{stack.endpoint}/chat/completions", content=pieces(), headers=headers, timeout=120).status_code


def num_running(stack: Stack) -> int:
    """How many engines Serve takes for running, by its own API: the command line would take the cores on which one starts."""
    shown = httpx.get(f"{stack.dashboard}/api/serve/applications/", headers=stack.dashboard_door, timeout=30).json()
    return sum(replica["state"] == "RUNNING" for replica in shown["applications"]["chat"]["deployments"]["engine"]["replicas"])
