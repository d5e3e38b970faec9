"""A backup of the running stack, put into another home: the registry there answers with the same versions and the same files."""

import dataclasses
import subprocess
import sys

from cluster.processes import free_port
from cluster.registry import Registry
from tests.ray.stack import Stack, wait_for


def test_a_backup_of_the_running_stack_is_a_registry_elsewhere(stack: Stack, guide, live_guide, tmp_path):
    archive = tmp_path / "backup.tar.gz"
    taken = stack.run("cluster", "backup", str(archive))
    assert taken.returncode == 0, taken.stderr
    other = Stack(tmp_path / "home", tmp_path, {"mlflow_port": free_port()})
    restored = other.run("cluster", "restore", str(archive))
    assert restored.returncode == 0, restored.stderr
    assert (other.home / "ray_token").read_text() == (stack.home / "ray_token").read_text()
    assert (other.home / "keys.json").read_text() == (stack.home / "keys.json").read_text()
