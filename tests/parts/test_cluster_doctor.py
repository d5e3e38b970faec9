"""The doctor finds what is wrong, says how to mend it, and changes nothing."""

import socket
from contextlib import ExitStack

import pytest

from cluster.doctor import Finding, examine
from cluster.session import token_file
from configs.schema import MachineConfig


@pytest.fixture
def machine(home):
    """A machine whose services would listen on ports that are free, and its door to Ray held by this process."""
    with ExitStack() as stack:
        doors = [stack.enter_context(socket.socket()) for _ in range(3)]
        for door in doors:
            door.bind(("127.0.0.1", 0))
        ray, dashboard, mlflow = (door.getsockname()[1] for door in doors)
        for door in doors[1:]:
            door.close()
        doors[0].listen()
        yield MachineConfig(ray_port=ray, dashboard_port=dashboard, mlflow_port=mlflow, min_disk_free_gib=0)


def found(machine: MachineConfig) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(machine)}


def test_what_fails_has_a_remedy_and_nothing_is_changed(machine, home):
    findings = examine(machine)
    assert {finding.mark for finding in findings} <= {"ok", "warn", "fail"}
    assert [finding for finding in findings if finding.mark != "ok" and not finding.remedy] == []
    assert {"torch", "versions", "disk", "memory", "open files", "Ray token", "HUGGINGFACE_TOKEN"} <= {finding.what for finding in findings}
    assert list(home.rglob("*")) == []


def test_what_make_setup_installed_is_as_the_lock_says(machine):
    assert found(machine)["versions"].mark == "ok"


def test_a_taken_port_fails_and_a_free_one_does_not(machine):
    findings = found(machine)
    taken = findings[f"port {machine.ray_port} (Ray)"]
    assert (taken.mark, "process" in taken.found, taken.remedy) == ("fail", True, "end that process, or choose another port")
    assert findings[f"port {machine.mlflow_port} (MLflow)"] == Finding("ok", f"port {machine.mlflow_port} (MLflow)", "free")


def test_a_port_that_tandem_holds_is_in_order(machine, up):
    up()
    finding = found(machine)[f"port {machine.ray_port} (Ray)"]
    assert (finding.mark, finding.found) == ("ok", "held by Tandem")


def test_a_token_that_others_may_read_fails(machine):
    token_file().write_text("secret")
    token_file().chmod(0o640)
    finding = found(machine)["Ray token"]
    assert (finding.mark, finding.remedy) == ("fail", f"chmod 600 {token_file()}")
    token_file().chmod(0o600)
    assert found(machine)["Ray token"].mark == "ok"


def test_a_full_disk_fails(machine):
    finding = found(machine.model_copy(update={"min_disk_free_gib": 1e9}))["disk"]
    assert (finding.mark, "TANDEM_HOME" in finding.remedy) == ("fail", True)


def test_the_hubs_token_is_never_shown(machine, monkeypatch):
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_secret")
    findings = found(machine)
    assert findings["HUGGINGFACE_TOKEN"].mark == "ok"
    assert "hf_secret" not in str(findings)


def test_the_command_line_ends_with_status_1_where_something_fails(machine, command):
    words = [f"{name}={getattr(machine, name)}" for name in ("ray_port", "dashboard_port", "mlflow_port")]
    ended = command("cluster", "doctor", "auto", *words)
    assert ended.status == 1
    assert "fail" in ended.out
    assert str(machine.ray_port) in ended.out
