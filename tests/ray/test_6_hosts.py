"""Two hosts with a network and a home of their own: the head trains; the other joins, trains and answers, is lost and comes back."""

import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.logs import SYSTEM, stream_file
from serve.desk import MAX_AGE_S
from tests.helpers.bucket import BUCKET, bucket_environment, has_bucket, own_bucket
from tests.helpers.environment import users_environment
from tests.helpers.hosts import Host, plug, switched_on, why_no_hosts
from tests.ray.stack import make_config, make_tiny_model, wait_for

pytestmark = pytest.mark.skipif("TANDEM_TEST_HOSTS" not in os.environ, reason="takes minutes: TANDEM_TEST_HOSTS=1 make test")
CHAT_PORT, BUCKET_PORT = 8000, 5555
OWN_CARDS = "serve.scaling.use_train_cards=false"
# One worker on each host.
LONG = ("train.num_workers=2", "train.max_steps=4000", "train.checkpoint_every_steps=20")
ASK = """
import http.client, json, sys
connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=60)
body = {"model": "tiny", "messages": [{"role": "user", "content": "What is number 3?"}], "max_tokens": 4}
headers = {"Authorization": "Bearer " + sys.argv[5], "Content-Type": "application/json"}
connection.request("POST", sys.argv[3], sys.argv[4] or json.dumps(body), headers)
answer = connection.getresponse()
print(answer.status, answer.read().decode())
"""


LIST_RUNS = """
import sys
from pathlib import PurePath
from pyarrow.fs import FileSelector, FileSystem
files, root = FileSystem.from_uri(sys.argv[1] if ":" in sys.argv[1] else "file://" + sys.argv[1])
print(*(PurePath(entry.path).name for entry in files.get_file_info(FileSelector(root + "/runs"))))
"""


@dataclass
class Pair:
    """The head and a machine that joins it."""

    head: Host
    other: Host
    config: Path
    storage: str

    def ask(self, key: str, path: str = "/v1/chat/completions", body: str = "", host: Host | None = None) -> tuple[int, dict]:
        """Ask the chat endpoint of the head from one of the hosts."""
        words = (self.head.address, str(CHAT_PORT), path, body, key)
        done = subprocess.run((host or self.head).command(sys.executable, "-c", ASK, *words), capture_output=True, text=True, check=False)
        if done.returncode:
            return 0, {"error": done.stderr[-300:]}
        status, _, said = done.stdout.partition(" ")
        return int(status), json.loads(said) if said.startswith("{") else {"text": said}

    def step(self, job: int) -> int | None:
        """How far a job of the queue is; None where it does not run."""
        shown = self.head.run("cluster", "queue").stdout
        line = next((line for line in shown.splitlines() if line.startswith(f"{job} ")), "")
        found = re.search(r"step (\d+)/", line)
        return int(found[1]) if found else None

    def runs(self) -> list[str]:
        """The runs that the storage keeps, as the head sees them."""
        done = subprocess.run(
            self.head.command(sys.executable, "-c", LIST_RUNS, self.storage),
            env=self.head.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    def make_key(self, name: str) -> str:
        """Make a key on the head, and return its secret."""
        return succeed(self.head, "serve", "keys", "create", name).split()[1]


def hidden_of(home: Path) -> Path:
    """Where Ray of another host keeps its sockets and logs."""
    return Path(tempfile.gettempdir()) / f"tandem-{hashlib.sha256(str(home).encode()).hexdigest()[:8]}"


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    if why := why_no_hosts():
        pytest.skip(why)
    base = Path(tempfile.mkdtemp(prefix="tandem-hosts-"))
    mine = users_environment()
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
        with switched_on(hosts), ExitStack() as stack:
            storage = str(base / "shared" / "storage")
            if has_bucket():  # the harder one of the two
                storage = BUCKET
                mine.update(bucket_environment(hosts[0].address, BUCKET_PORT))
                stack.enter_context(own_bucket(hosts[0].address, BUCKET_PORT, hosts[0].command()))
            yield Pair(*hosts, config, storage)
    finally:
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="module")
def key(pair: Pair) -> str:
    return pair.make_key("alice")


def succeed(host: Host, *words: str, **environment: str) -> str:
    """Run a command that must succeed, and return what it says."""
    done = host.run(*words, timeout_s=400, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def card_lines(host: Host) -> list[dict]:
    """What a host's own log says of cards."""
    file = stream_file(host.home / "logs", SYSTEM)
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if line["event"] == "card"]


def test_a_machine_joins_with_the_heads_token_and_only_with_it(pair: Pair):
    head, other = pair.head, pair.other
    told = succeed(head, "cluster", "up", "auto", f"listen_host={head.address}", "cards=[{pool: train}]", f"storage={pair.storage}")
    assert f"python -m cluster join {head.address}:5000" in told
    for token, why in (("", "does not have the cluster's token"), ("x" * 64, "the head knows another token")):
        refused = other.run("cluster", "join", head.address, TANDEM_TOKEN=token)
        assert refused.returncode == 2
        assert why in refused.stderr
    joined = succeed(other, "cluster", "join", head.address, TANDEM_TOKEN=(head.home / "ray_token").read_text())
    assert "beta: beta-card0, beta-card1" in joined
    assert "beta-card0, beta-card1" in succeed(other, "cluster", "join", head.address), "again is as once"
    for host in (head, other):
        shown = succeed(host, "cluster", "status")
        assert re.search(rf"^beta +{other.address} +beta-card0, beta-card1 +up *$", shown, re.MULTILINE), shown
    assert "done on the cluster's head" in other.run("serve", "status").stderr


def test_each_machine_tells_how_its_own_cards_are(pair: Pair):
    for host, machine, cards in ((pair.head, "head", {"card0"}), (pair.other, "beta", {"beta-card0", "beta-card1"})):
        told = wait_for(lambda host=host, cards=cards: (lines := card_lines(host)) and {line["card"] for line in lines} == cards and lines)
        assert {(line["machine"], line["host"]) for line in told} == {(machine, host.name)}
        assert any(line["memory_used_gib"] > 0 for line in told), "its raylet"


def test_one_trains_and_the_other_serves(pair: Pair, key: str):
    assert "registered as tiny:1" in succeed(pair.head, "train", str(pair.config), TANDEM_CARDS="card0")
    succeed(pair.head, "serve", "promote", "tiny:1")
    refused = pair.head.run("serve", str(pair.config), OWN_CARDS)
    assert refused.returncode == 2
    assert "machines that joined" in refused.stderr
    succeed(pair.head, "serve", str(pair.config), OWN_CARDS, "serve.host=0.0.0.0")
    assert re.search(r"^beta-card0 .* chat ", succeed(pair.head, "cluster", "status"), re.MULTILINE)
    wait_for(lambda: pair.ask(key)[0] == 200)
    assert pair.ask(key, host=pair.other)[0] == 200
    assert pair.ask("")[0] == 401


def test_a_key_that_is_revoked_on_the_head_is_out_on_the_other_machine_within_two_seconds(pair: Pair):
    secret = pair.make_key("bob")
    wait_for(lambda: pair.ask(secret)[0] == 200)
    succeed(pair.head, "serve", "keys", "revoke", "bob")
    time.sleep(MAX_AGE_S)
    assert pair.ask(secret)[0] == 401


def test_feedback_on_an_answer_of_the_other_machine_lies_on_the_head(pair: Pair, key: str):
    _, said = pair.ask(key)
    status, told = pair.ask(key, "/v1/feedback", json.dumps({"completion_id": said["id"], "rating": "up"}))
    assert status == 200, told
    with sqlite3.connect(pair.head.home / "feedback.db") as database:
        assert database.execute("select version, rating from feedback").fetchall() == [("tiny:1", "up")]
    assert not (pair.other.home / "feedback.db").exists()


def test_a_machine_is_lost_and_comes_back_and_chat_and_job_go_on(pair: Pair, key: str):
    head, other = pair.head, pair.other
    succeed(head, "cluster", "submit", str(pair.config), *LONG)
    step = wait_for(lambda: (now := pair.step(1)) and now > 20 and now)
    other.lose()
    wait_for(lambda: re.search(r"^beta .* gone *$", succeed(head, "cluster", "status"), re.MULTILINE))
    assert pair.ask(key)[0] in (0, 503), "its engine was there"
    other.start()
    plug(head, other)
    succeed(other, "cluster", "join", head.address)
    wait_for(lambda: pair.ask(key)[0] == 200)
    wait_for(lambda: (pair.step(1) or 0) > step)
    assert len(pair.runs()) == 2, "the job's run is the one that it began with"
    succeed(head, "cluster", "cancel", "1")


def test_a_machine_leaves_and_the_head_goes_on(pair: Pair):
    assert "processes ended" in succeed(pair.other, "cluster", "leave")
    assert re.search(r"^card0 .* up *$", succeed(pair.head, "cluster", "status"), re.MULTILINE)
    assert "processes ended" in succeed(pair.head, "cluster", "down")
