"""The stack itself: up, up again, status, what listens, what is refused."""

import json
import os
import re

import httpx
import pytest

from cluster.cards import find_gpus
from cluster.processes import Process, quiet_port
from tests.ray.stack import Stack, make_config, wait_for


def test_a_second_up_changes_nothing(stack: Stack):
    before = (stack.home / "cluster.json").read_text()
    done = stack.up()
    assert done.returncode == 0
    assert "was up already" in done.stdout
    assert (stack.home / "cluster.json").read_text() == before


def test_an_up_with_other_settings_is_refused(stack: Stack):
    before = (stack.home / "cluster.json").read_text()
    done = stack.run("cluster", "up", "auto", *(f"{name}={quiet_port()}" for name in stack.ports if name != "chat"))
    assert done.returncode == 2
    assert "up with other settings" in done.stderr
    assert "python -m cluster down" in done.stderr
    assert (stack.home / "cluster.json").read_text() == before


def test_what_a_killed_up_left_is_no_cluster_and_down_ends_it(stack: Stack, tmp_path):
    other = Stack(tmp_path / "home", tmp_path, {name: quiet_port() for name in stack.ports})
    record = other.home / "cluster.json"
    up = other.begin("cluster", "up", "auto", *(f"{name}={port}" for name, port in other.ports.items() if name != "chat"))
    wait_for(record.exists)
    up.kill()
    up.wait()
    left = [Process(**entry) for entry in json.loads(record.read_text())["processes"]]
    assert all(process.running() for process in left)
    assert "the cluster is not ready" in other.run("cluster", "status").stderr
    assert other.run("cluster", "down").returncode == 0
    assert not any(process.running() for process in left)
    assert not record.exists()


def test_status_lists_a_card_of_each_pool_and_the_services(stack: Stack):
    shown = stack.run("cluster", "status").stdout
    for pool in ("serve", "train"):
        assert re.search(rf"^card\d+ +{pool} .* up *$", shown, re.MULTILINE), shown
    assert f"http://127.0.0.1:{stack.ports['mlflow_port']}" in shown


def test_the_job_api_wants_the_token(stack: Stack):
    url = f"http://127.0.0.1:{stack.ports['dashboard_port']}/api/jobs/"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": "Bearer wrong"}).status_code == 403
    token = (stack.home / "ray_token").read_text()
    assert httpx.get(url, headers={"Authorization": f"Bearer {token}"}).status_code == 200
    assert (stack.home / "ray_token").stat().st_mode & 0o077 == 0


def test_another_stack_that_wants_a_taken_port_is_refused_and_leaves_nothing(stack: Stack, tmp_path):
    other = Stack(tmp_path / "home", tmp_path, {**{name: quiet_port() for name in stack.ports}, "mlflow_port": stack.ports["mlflow_port"]})
    done = other.up()
    assert done.returncode == 2
    assert f"port {stack.ports['mlflow_port']} (mlflow_port) is held by" in done.stderr
    assert "mlflow_port=" in done.stderr
    assert not (tmp_path / "home" / "cluster.json").exists()


@pytest.mark.skipif(bool(find_gpus()) or len(os.sched_getaffinity(0)) < 2, reason="it is of two cards without a GPU, on two cores")
def test_a_card_with_cores_of_its_own_trains_there_and_rays_head_is_elsewhere(stack: Stack, tiny_model, tmp_path):
    other = Stack(tmp_path / "home", tmp_path, {name: quiet_port() for name in stack.ports})
    everywhere = os.sched_getaffinity(0)
    one, other_one = sorted(everywhere)[:2]
    machine = [f"{name}={port}" for name, port in other.ports.items() if name != "chat"]
    try:
        up = other.run("cluster", "up", "auto", f"cards=[{{pool: serve, cores: {one}}}, {{pool: train, cores: {other_one}}}]", *machine)
        assert up.returncode == 0, up.stderr
        session = json.loads((other.home / "cluster.json").read_text())
        raylets = {}
        for entry in session["processes"]:
            for member in Process(**entry).family():
                if any(word.endswith("/raylet") for word in member.cmdline()):
                    raylets[entry["name"]] = set(member.cpu_affinity())
        assert raylets == {"head": everywhere, "card0": {one}, "card1": {other_one}}
        trained = other.run("train", str(make_config(tmp_path, tiny_model, other.ports["chat"])))
        assert trained.returncode == 0, trained.stderr
        assert "registered as tiny:1" in trained.stdout
    finally:
        other.run("cluster", "down")


def test_more_workers_than_train_cards_are_refused_at_once(stack: Stack, config):
    done = stack.run("train", str(config), "train.num_workers=4")
    assert done.returncode == 2
    assert "train.num_workers=4 wants as many train cards" in done.stderr
    assert "Traceback" not in done.stderr
