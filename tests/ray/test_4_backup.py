"""A backup of the running stack, put into another home: the registry there has the same versions, aliases and files."""

import subprocess
import sys
from pathlib import Path

from cluster.processes import free_port
from cluster.registry import Registry, Version
from cluster.session import answers
from configs.loader import ROOT
from tests.ray.stack import Stack, wait_for


def known(registry: Registry) -> dict[str, tuple[tuple[str, ...], dict[str, str]]]:
    """All versions, with their aliases and tags."""
    return {version.name: (version.aliases, version.tags) for version in registry.versions()}


def files(registry: Registry, version: Version, folder: Path) -> dict[str, bytes]:
    """What the registry keeps with a version's run, fetched through its server."""
    folder.mkdir()
    there = Path(registry.client.download_artifacts(version.run_id, "", str(folder)))
    return {str(file.relative_to(there)): file.read_bytes() for file in there.rglob("*") if file.is_file()}


def test_a_backup_of_the_running_stack_is_the_same_registry_elsewhere(stack: Stack, guide: Version, tmp_path):
    assert stack.run("serve", "promote", guide.name).returncode == 0
    before, archive = known(stack.registry), tmp_path / "tandem.tar.gz"
    taken = stack.run("cluster", "backup", str(archive))
    assert taken.returncode == 0, taken.stderr
    assert "the cluster is up" in stack.run("cluster", "restore", str(archive), "--replace").stderr

    other = Stack(tmp_path / "home", tmp_path, {"mlflow_port": free_port()})
    restored = other.run("cluster", "restore", str(archive))
    assert restored.returncode == 0, restored.stderr
    assert (other.home / "ray_token").read_bytes() == (stack.home / "ray_token").read_bytes()
    server = [sys.executable, "-m", "cluster", "run", "mlflow", "listen_host=127.0.0.1", f"mlflow_port={other.ports['mlflow_port']}"]
    with (tmp_path / "mlflow.log").open("wb") as log:
        mlflow = subprocess.Popen(server, cwd=ROOT, env=other.environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: answers(f"{other.registry.url}/health"))
        assert known(other.registry) == before
        assert "live" in before[guide.name][0]
        kept = files(other.registry, guide, tmp_path / "there")
        assert kept == files(stack.registry, guide, tmp_path / "here")
        assert "adapter/adapter_model.safetensors" in kept
    finally:
        mlflow.terminate()
        mlflow.wait()
