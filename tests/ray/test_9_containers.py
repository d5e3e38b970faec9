"""The very commands of compose.yaml, outside a container engine: MLflow, the head and a card become one cluster, none of them root."""

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.logs import SYSTEM
from tests.helpers.containers import USER_ID, Container, Network, container, network, read_services, why_no_containers
from tests.ray.stack import wait_for

ARCHIVE = "/var/lib/tandem-storage/backup.tar.gz"
NAMES = {"mlflow": "mlflow", "head": "head", "train": "train-cpu"}

pytestmark = [
    pytest.mark.skipif("TANDEM_TEST_HOSTS" not in os.environ, reason="takes minutes: TANDEM_TEST_HOSTS=1 make test"),
    pytest.mark.skipif(bool(why := why_no_containers()), reason=why),
]


@pytest.fixture
def net(tmp_path) -> Iterator[Network]:
    """A network, and the secrets of who is on it."""
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "tandem_token").write_text(secrets.token_hex(32))
    (tmp_path / "secrets" / "tandem_token").chmod(0o444)
    with network(tmp_path, [*NAMES, "restore"]) as net:
        yield net


@pytest.fixture
def parts(net, tmp_path) -> Iterator[dict[str, Container]]:
    """The three, started in the order in which Compose would."""
    services = read_services()
    with ExitStack() as stack:
        started: dict[str, Container] = {}
        for name, service in NAMES.items():
            started[name] = stack.enter_context(container(net, name, services[service], tmp_path / "secrets"))
            log = tmp_path / f"{name}.log"

            def healthy(name=name, log=log) -> bool:
                assert started[name].process.poll() is None, log.read_text()
                return started[name].is_healthy()

            wait_for(healthy)
        yield started


def events_shown(log: Path) -> set[tuple[str, str]]:
    """What a container's log shows of the stream `system`: machine and event of each line."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return {(line.get("machine", ""), line["event"]) for line in lines if line["stream"] == SYSTEM}


def test_the_services_become_one_cluster_that_ends_when_asked_and_is_restored(parts, restored, tmp_path):
    shown = parts["head"].run("python", "-m", "cluster", "status")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^train-card0 +train +cpu .* up *$", shown.stdout, re.MULTILINE), shown.stdout
    assert "http://mlflow:5000" in shown.stdout
    assert (tmp_path / "home" / "cluster.json").stat().st_uid == USER_ID
    for name, event in (("head", "host"), ("train", "host"), ("train", "card")):
        wait_for(lambda name=name, event=event: (name, event) in events_shown(tmp_path / f"{name}.log"))
    taken = parts["head"].run("python", "-m", "cluster", "backup", ARCHIVE)
    assert taken.returncode == 0, taken.stderr
    for name in ("train", "head"):
        assert parts[name].stop() == 0, (tmp_path / f"{name}.log").read_text()
    assert not (tmp_path / "home" / "cluster.json").exists()
    assert "MLflow runs on this home folder" in restored(2)
    assert parts["mlflow"].stop() == 0
    assert "restored" in restored(0)
    assert list((tmp_path / "home").glob(".replaced-*/mlflow")), "what was there is kept"


@pytest.fixture
def restored(parts, net, tmp_path) -> Callable[[int], str]:
    """Restores as `docker compose run --no-deps head` does, and returns what it says."""

    def restore(exit_status: int) -> str:
        command = ["cluster", "restore", ARCHIVE, "--replace"]
        with container(net, "restore", read_services()["head"] | {"command": command}, tmp_path / "secrets") as once:
            assert once.process.wait(timeout=60) == exit_status, (tmp_path / "restore.log").read_text()
        return (tmp_path / "restore.log").read_text()

    return restore
