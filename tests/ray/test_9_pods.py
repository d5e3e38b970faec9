"""The very commands of the manifests with KubeRay's variables, outside Kubernetes: a head that is lost comes back with what Redis kept."""

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from cluster.kuberay import ARBITER_PORT, HEAD_ADDRESS, START_COMMAND
from cluster.manifests import make_manifests
from cluster.pods import CONFIG_FOLDER, METRICS_PORT
from configs.loader import load_chatbot, load_machine
from tests.helpers.containers import Container, Network, container, network, why_no_containers
from tests.ray.stack import wait_for

HEAD_SERVICE, REDIS, MLFLOW = "tandem-head-svc", "tandem-redis", "tandem-mlflow"
PODS = ("head", "moved", "train")
CONFIGS = "/run/tandem"  # /etc is not ours to mount in
REDIS_PORT = "6390"  # in a pod 6379; here all have one network, in which the head takes that one at every address
SECRETS = {"auth_token": secrets.token_hex(32), "redis_password": secrets.token_hex(16)}
CARD_METRICS_PORT = 8082  # likewise: in a pod of its own the same as the head's
METRICS = f"""python -c 'import urllib.request as http
for place in ("head:{METRICS_PORT}", "train:{CARD_METRICS_PORT}", "head:{ARBITER_PORT}"):
    print(http.urlopen("http://" + place + "/metrics").status)'"""
RAYLET = "pgrep -f /raylet/[r]aylet | head -1"
JOBS = ". /var/lib/tandem/env && python -m ray.scripts.scripts job list"  # `ray` itself names the folder where it was installed
SUBMIT = ". /var/lib/tandem/env && python -m ray.scripts.scripts job submit --submission-id kept -- true"

pytestmark = [
    pytest.mark.skipif("TANDEM_TEST_HOSTS" not in os.environ, reason="takes minutes: TANDEM_TEST_HOSTS=1 make test"),
    pytest.mark.skipif(bool(why := why_no_containers()), reason=why),
    pytest.mark.skipif(not shutil.which("redis-server"), reason="no redis-server (Debian's package of that name)"),
]


@pytest.fixture(scope="module")
def made() -> dict[str, dict[str, Any]]:
    """Each object of the manifests, by kind and name."""
    config, machine = load_chatbot("configs/helpdesk.yaml", []), load_machine("kubernetes", ["deploy.train.gpu=null"])
    objects = [entry for entries in make_manifests(config, machine, {}).values() for entry in entries]
    return {f"{entry['kind']}/{entry['metadata']['name']}": entry for entry in objects}


@pytest.fixture
def net(made, tmp_path) -> Iterator[Network]:
    """A network with a Redis on it, and the configs that pods mount."""
    (tmp_path / "config").mkdir()
    for name, text in made["ConfigMap/tandem-helpdesk"]["data"].items():
        (tmp_path / "config" / name).write_text(text)
    with network(tmp_path, [HEAD_SERVICE, REDIS, MLFLOW, *PODS]) as net, redis(net):
        point(net, "head")
        yield net


@contextmanager
def redis(net: Network) -> Iterator[None]:
    """Run a Redis that asks for the password, as that of `ground.yaml` does."""
    place = ["--bind", net.addresses[REDIS], "--port", REDIS_PORT, "--dir", str(net.folder)]
    words = ["redis-server", *place, "--requirepass", SECRETS["redis_password"]]
    server = subprocess.Popen(["nsenter", "--target", str(net.holder.pid), "--net", *words], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        server.kill()
        server.wait()


def point(net: Network, pod: str) -> None:
    """Have the head's name, which outlives its pod, lead to this one."""
    names = {**net.addresses, HEAD_SERVICE: net.addresses[pod]}
    net.hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in names.items()))


def as_service(template: dict[str, Any], **kuberay: str) -> dict[str, Any]:
    """Return a pod's container in the form of a service of Compose, with the variables that KubeRay would add."""
    (found,) = template["spec"]["containers"]
    places = {mount["name"] + mount.get("subPath", "").replace("/", "-"): mount["mountPath"] for mount in found["volumeMounts"]}
    environment = {}
    for variable in found["env"]:
        named = variable.get("valueFrom", {}).get("secretKeyRef", {}).get("key")
        environment[variable["name"]] = SECRETS[named] if named else variable["value"]
    return {
        "command": [word.replace(CONFIG_FOLDER, CONFIGS) for word in found["command"][2:]],
        "environment": {**environment, **kuberay},
        "volumes": [f"{name}:{place.replace(CONFIG_FOLDER, CONFIGS)}" for name, place in places.items() if place != "/dev/shm"],
        "healthcheck": {"test": ["CMD", *found.get("startupProbe", {"exec": {"command": ["true"]}})["exec"]["command"]]},
    }


def head_of(made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The head, as KubeRay 1.6 starts it with fault tolerance and an autoscaler beside it."""
    group = made["RayCluster/tandem"]["spec"]["headGroupSpec"]
    flags = f"{_flags(group)} --block --dashboard-host=0.0.0.0 --no-monitor --redis-password=$REDIS_PASSWORD"
    return as_service(
        group["template"],
        **{START_COMMAND: f"ray start --head {flags}"},
        RAY_ADDRESS="127.0.0.1:6379",
        RAY_PORT="6379",
        RAY_REDIS_ADDRESS=f"{REDIS}:{REDIS_PORT}",
        RAY_external_storage_namespace="the-clusters-uid",
        RAY_CLUSTER_NAME="tandem",
        RAY_NODE_TYPE_NAME="headgroup",
        RAY_USAGE_STATS_KUBERAY_IN_USE="1",
        REDIS_PASSWORD=SECRETS["redis_password"],
    )


def card_of(made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A train card, which knows the head by its name and has ten minutes to find it again."""
    group = next(entry for entry in made["RayCluster/tandem"]["spec"]["workerGroupSpecs"] if entry["groupName"] == "train")
    flags = _flags(group).replace(str(METRICS_PORT), str(CARD_METRICS_PORT))
    return as_service(
        group["template"],
        **{START_COMMAND: f"ray start {flags} --address={HEAD_SERVICE}:6379 --block", HEAD_ADDRESS: HEAD_SERVICE},
        RAY_ADDRESS=f"{HEAD_SERVICE}:6379",
        RAY_PORT="6379",
        RAY_gcs_rpc_server_reconnect_timeout_s="600",
        RAY_CLUSTER_NAME="tandem",
        RAY_NODE_TYPE_NAME="train",
        RAY_USAGE_STATS_KUBERAY_IN_USE="1",
    )


def _flags(group: dict[str, Any]) -> str:
    return " ".join(f"--{name}={value}" for name, value in group["rayStartParams"].items())


@pytest.fixture
def pods(net, made, tmp_path) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        mlflow = as_service(made[f"StatefulSet/{MLFLOW}"]["spec"]["template"])
        stack.enter_context(container(net, MLFLOW, mlflow, tmp_path))
        yield stack


def begun(stack: ExitStack, net: Network, name: str, service: dict[str, Any]) -> Container:
    """Start a pod, and wait until its probe takes it for whole."""
    pod = stack.enter_context(container(net, name, service, net.folder))

    def healthy() -> bool:
        assert pod.process.poll() is None, (net.folder / f"{name}.log").read_text()
        return pod.is_healthy()

    wait_for(healthy, timeout_s=300)
    return pod


def said(pod: Container, script: str) -> str:
    """Run a script in a pod, and return what it says."""
    done = pod.run("bash", "-c", script)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_head_that_moved_goes_on_with_what_redis_kept_and_its_cards_stay(net, made, pods):
    head, card = begun(pods, net, "head", head_of(made)), begun(pods, net, "train", card_of(made))
    assert said(head, METRICS).split() == ["200"] * 3, "where the PodMonitor looks"
    raylet = said(card, RAYLET)
    said(head, SUBMIT)
    head.kill()
    point(net, "moved")
    moved = begun(pods, net, "moved", head_of(made))
    wait_for(card.is_healthy, timeout_s=300)
    assert "kept" in said(moved, JOBS)
    assert said(card, RAYLET) == raylet != "", "it waited for the head, and was not begun anew"
