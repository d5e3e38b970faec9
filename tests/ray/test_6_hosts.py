"""Two hosts with a network and a home of their own: the head trains; the other joins, trains and answers, is lost and comes back."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.hosts import Host, plug, switched_on, why_no_hosts
from tests.ray.stack import SECRETS, make_config, make_tiny_model, wait_for

CHAT_PORT = 8000
ASK = """
import http.client, json, sys
connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=60)
body = {"model": "tiny", "messages": [{"role": "user", "content": "What is number 3?"}], "max_tokens": 4}
headers = {"Authorization": "Bearer " + sys.argv[5], "Content-Type": "application/json"}
connection.request("POST", sys.argv[3], sys.argv[4] or json.dumps(body), headers)
answer = connection.getresponse()
print(answer.status, answer.read().decode())
"""


@dataclass
class Pair:
    """The head and a machine that joins it."""

    head: Host
    other: Host
    config: Path

    def ask(self, key: str, path: str = "/v1/chat/completions", body: str = "", host: Host | None = None) -> tuple[int, dict]:
        """Ask the chat endpoint of the head from one of the hosts."""
        words = (self.head.address, str(CHAT_PORT), path, body, key)
        done = subprocess.run((host or self.head).command(sys.executable, "-c", ASK, *words), capture_output=True, text=True, check=False)
        if done.returncode:
            return 0, {"error": done.stderr[-300:]}
        status, _, said = done.stdout.partition(" ")
        return int(status), json.loads(said) if said.startswith("{") else {"text": said}

    def queue(self, job: int) -> str:
        """The line of a job in the queue."""
        shown = self.head.run("cluster", "queue").stdout
        return next((line for line in shown.splitlines() if line.startswith(f"{job} ")), "")


def hidden_of(home: Path) -> Path:
    """Where Ray of another host keeps its sockets and logs."""
    return Path(tempfile.gettempdir()) / f"tandem-{hashlib.sha256(str(home).encode()).hexdigest()[:8]}"


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    if why := why_no_hosts():
        pytest.skip(why)
    base = Path(tempfile.mkdtemp(prefix="tandem-hosts-"))
    mine = {key: value for key, value in os.environ.items() if key not in SECRETS and not key.startswith("RAY_")}
    homes = {name: base / name / "home" for name in ("alpha", "beta")}
    for home in homes.values():
        home.mkdir(parents=True)
    hosts = [
        Host(name, f"10.87.0.{place}", homes[name], (base / other, hidden_of(homes[other])), mine)
        for place, (name, other) in enumerate((("alpha", "beta"), ("beta", "alpha")), 1)
    ]
    (base / "shared").mkdir()
    config = make_config(base / "shared", make_tiny_model(base / "shared" / "tiny-model"), CHAT_PORT)
    try:
        with switched_on(hosts):
            yield Pair(*hosts, config)
    finally:
        if not os.environ.get("TANDEM_KEEP_HOSTS"):
            shutil.rmtree(base, ignore_errors=True)


def test_one_trains_the_other_serves_and_is_lost_and_comes_back(pair: Pair):
    head, other, shared = pair.head, pair.other, pair.config.parent
    began = time.time()

    def note(what):
        print(f"{time.time() - began:6.1f} s  {what}", flush=True)

    up = head.run("cluster", "up", "auto", f"listen_host={head.address}", "cards=[{pool: train}]", f"storage={shared}/storage")
    assert up.returncode == 0, up.stderr
    assert "python -m cluster join 10.87.0.1:5000" in up.stdout
    note("up")
    refused = other.run("cluster", "join", head.address)
    assert refused.returncode == 2
    assert "does not have the cluster's token" in refused.stderr
    refused = other.run("cluster", "join", head.address, TANDEM_TOKEN="x" * 64)
    assert refused.returncode == 2
    assert "the head knows another token" in refused.stderr
    token = (head.home / "ray_token").read_text()
    joined = other.run("cluster", "join", head.address, TANDEM_TOKEN=token)
    assert joined.returncode == 0, joined.stderr
    assert "beta: beta-card0, beta-card1" in joined.stdout
    note("joined")
    again = other.run("cluster", "join", head.address)
    assert again.returncode == 0, again.stderr
    shown = head.run("cluster", "status").stdout
    print(shown)
    assert re.search(r"^beta +10\.87\.0\.2 +beta-card0, beta-card1 +up", shown, re.MULTILINE), shown

    done = head.run("train", str(pair.config), TANDEM_CARDS="card0")
    assert done.returncode == 0, done.stderr
    note("trained")
    assert head.run("serve", "promote", "tiny:1").returncode == 0
    own_cards = "serve.scaling.use_train_cards=false"
    loopback = head.run("serve", str(pair.config), own_cards)
    assert loopback.returncode == 2
    assert "machines that joined" in loopback.stderr
    key = head.run("serve", "keys", "create", "alice").stdout.split()[1]
    served = head.run("serve", str(pair.config), own_cards, "serve.host=0.0.0.0", timeout_s=400)
    assert served.returncode == 0, served.stderr
    note("served")
    status, said = pair.ask(key)
    assert status == 200, said
    assert pair.ask("")[0] == 401
    opinion = json.dumps({"completion_id": said["id"], "rating": "up"})
    status, told = pair.ask(key, path="/v1/feedback", body=opinion)
    assert status == 200, told
    assert (head.home / "feedback.db").is_file()
    status, said = pair.ask(key, host=other)
    assert status == 200, said
    note("asked")
    bob = head.run("serve", "keys", "create", "bob", "--rpm", "1").stdout.split()[1]
    wait_for(lambda: pair.ask(bob)[0] != 401)
    assert head.run("serve", "keys", "revoke", "bob").returncode == 0
    time.sleep(2)
    assert pair.ask(bob)[0] == 401
    note("revoked")

    long = ("train.num_workers=2", "train.max_steps=4000", "train.checkpoint_every_steps=20", "train.batch_size=4")
    submitted = head.run("cluster", "submit", str(pair.config), *long)
    assert submitted.returncode == 0, submitted.stderr
    wait_for(lambda: list((shared / "storage" / "runs").glob("*/checkpoint_*/")) and "step" in pair.queue(1), 200)
    note(pair.queue(1))
    other.lose()
    note("lost")
    wait_for(lambda: "beta-card0" in (shown := head.run("cluster", "status").stdout) and "gone" in shown)
    note("noticed")
    print(head.run("cluster", "status").stdout)
    print(pair.ask(key))
    other.start()
    plug(head, other)
    joined = other.run("cluster", "join", head.address)
    assert joined.returncode == 0, joined.stderr
    note("joined again")
    wait_for(lambda: pair.ask(key)[0] == 200, 200)
    note("chat answers")
    for _ in range(25):
        note(pair.queue(1))
        time.sleep(3)
    print(head.run("cluster", "cancel", "1"))
    shown = "from cluster.session import *; s = read_session(); [print(r['state'], r['labels'].get('machine'), r.get('deathInfo'), r.get('endTimeMs'), r.get('nodeManagerAddress')) for r in read_raylets(s.dashboard())]"
    print(
        subprocess.run(
            head.command(sys.executable, "-c", shown),
            env={**head.environment, "TANDEM_HOME": str(head.home)},
            capture_output=True,
            text=True,
        )
    )
    print(head.run("cluster", "status").stdout)
    left = other.run("cluster", "leave")
    assert left.returncode == 0, left.stderr
    print(head.run("cluster", "status").stdout)
    print(
        subprocess.run(
            head.command(sys.executable, "-c", shown),
            env={**head.environment, "TANDEM_HOME": str(head.home)},
            capture_output=True,
            text=True,
        ).stdout
    )
    assert head.run("cluster", "down").returncode == 0
    note("down")
