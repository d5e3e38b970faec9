"""The Dockerfile, compose.yaml and GitHub's workflow, by their own checkers where those are there, and by what must be so."""

import importlib
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from cluster.parts import ray_folder
from configs.loader import ROOT, load_machine
from tests.helpers.containers import DOCKER, USER_ID, image_environment, read_services

PROFILES = ("cpu", "gpu", "monitoring")
SWITCHES = ("TANDEM_TEST_HOSTS", "TANDEM_TEST_README")  # of tests that take long


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    return read_services()


def checked(*command: str) -> None:
    if not shutil.which(command[0]):
        pytest.skip(f"no {command[0]} here")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_is_as_the_specification_says():
    checked("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(DOCKER / "compose.yaml"))


def test_the_workflow_is_one_of_githubs_and_no_pull_request_runs_on_our_machines():
    file = ROOT / ".github" / "workflows" / "ci.yml"
    jobs = yaml.safe_load(file.read_text())["jobs"]
    for name in ("gpu", "proofs", "containers"):
        assert jobs[name]["if"] == "github.event_name == 'schedule' || github.event_name == 'workflow_dispatch'"
    assert {"run": "bash .ci/run"} in jobs["test"]["steps"]
    checked("check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(file))


def test_at_night_nothing_is_green_since_it_was_skipped():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    runs = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert runs["gpu"][0] == "nvidia-smi -L"
    asked_for = [
        file for file in (ROOT / "tests" / "ray").glob("test_*.py") if set(SWITCHES) & set(re.findall(r"TANDEM_\w+", file.read_text()))
    ]
    assert set(jobs["proofs"]["env"]) == set(SWITCHES)
    assert {f"tests/ray/{file.name}" for file in asked_for} == set(re.findall(r"tests/ray/\w+\.py", runs["proofs"][0]))
    assert "-rs" in runs["proofs"][0]
    assert runs["proofs"][1] == "! grep SKIPPED said"


def test_the_containers_of_the_workflow_have_all_secrets(services):
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["containers"]
    profiles = set(job["env"]["COMPOSE_PROFILES"].split(","))
    started = [service for service in services.values() if profiles & set(service["profiles"])]
    made = next(step["run"] for step in job["steps"] if step.get("name") == "make the secrets")
    assert profiles == {"cpu", "monitoring"}
    assert all(secret in made for service in started for secret in service.get("secrets", []))


def test_cards_on_the_cpu_have_shares_of_a_laptop(services):
    shares = [services[name] for name in ("serve-cpu", "train-cpu")]
    assert sum(int(share["cpus"]) for share in shares) <= 4
    assert sum(int(share["mem_limit"].removesuffix("g")) for share in shares) <= 12


def test_who_reads_a_secret_is_the_user_that_the_readme_names(services):
    """Compose binds the file as it is: what one user may read, another may not."""
    for name, service in services.items():
        if "secrets" in service:
            assert service.get("image", "").startswith("tandem:") or service["user"] == f"{USER_ID}:{USER_ID}", name


def test_docker_compose_reads_it(tmp_path):
    # Debian's is the first version, which asks for no engine, and does not know a name at the top.
    text = re.sub(r"^name: .*$", "", (DOCKER / "compose.yaml").read_text(), flags=re.MULTILINE)
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c" / "compose.yaml").write_text(text)
    profiles = [word for profile in PROFILES for word in ("--profile", profile)]
    checked("docker-compose", "-f", str(tmp_path / "a" / "b" / "c" / "compose.yaml"), *profiles, "config", "-q")


def test_the_dockerfile_has_no_known_flaw():
    checked("hadolint", str(DOCKER / "Dockerfile"))


def test_both_images_end_without_root_and_take_the_locks():
    text = (DOCKER / "Dockerfile").read_text()
    for target in ("cpu", "gpu"):
        stage = re.search(rf"^FROM runtime AS {target}$(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL)
        assert stage
        assert stage[1].rstrip().endswith("USER 10001:10001")
        assert f"TANDEM_SET={target} python cluster/bootstrap.py" in text


def test_every_service_has_a_profile_and_all_but_two_a_health_check(services):
    assert {profile for service in services.values() for profile in service["profiles"]} == set(PROFILES)
    without = {name for name, service in services.items() if "healthcheck" not in service}
    assert without == {"loki", "alloy"}, "Grafana's asks for these, whose images have nothing to ask with"


def test_nothing_is_open_beyond_loopback_and_no_secret_is_written(services):
    text = (DOCKER / "compose.yaml").read_text()
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert service["cap_drop"] == ["ALL"]
    told = yaml.safe_load(text)
    assert all(set(secret) == {"file"} for secret in told["secrets"].values())
    for name in ("HUGGINGFACE_TOKEN", "FEEDBACK_URL"):
        assert told["x-environment"][name] == f"${{{name}:-}}"


def test_every_part_has_settings_that_a_machine_may_have(services):
    parts = {name: service["command"] for name, service in services.items() if service.get("command", [])[:2] == ["cluster", "run"]}
    assert {command[2] for command in parts.values()} == {"head", "card", "mlflow"}
    for command in parts.values():
        machine = load_machine("auto", ["listen_host=10.0.0.1", *(word for word in command if "=" in word)])
        assert command[2] != "card" or len(machine.cards) == 1


def test_the_streams_that_parts_show_fill_no_disk(services):
    """Docker keeps all of a container's output unless it is told how much."""
    for service in services.values():
        if service.get("command", [])[:2] == ["cluster", "run"]:
            assert {"max-size", "max-file"} <= service["logging"]["options"].keys()


def test_what_monitoring_mounts_is_there(services):
    mounted = [volume.split(":")[0] for name in services for volume in services[name].get("volumes", []) if volume.startswith("..")]
    assert len(mounted) >= 5
    for place in mounted:
        assert (DOCKER / place).exists(), place


def test_grafana_is_told_all_that_it_is_asked_to_look_up_and_alertmanager_is_where_it_says(services):
    folder = DOCKER.parent / "monitoring" / "grafana" / "provisioning"
    asked = {name for file in folder.rglob("*.yml") for name in re.findall(r": \$(\w+)", file.read_text())}
    told = services["grafana"]["environment"]
    assert {"ALERTMANAGER_URL", "LOKI_URL", "PROMETHEUS_URL"} <= asked <= told.keys()
    for name, option in (("prometheus", "PROMETHEUS_URL"), ("alertmanager", "ALERTMANAGER_URL")):
        assert f"--web.listen-address={told[option].removeprefix('http://')}" in services[name]["command"]


def test_ray_keeps_its_files_where_monitoring_looks(services, monkeypatch):
    """What the head leaves for Prometheus are links to Ray's own folder, which must have the same path there."""
    monkeypatch.delenv("TMPDIR", raising=False)
    assert image_environment()["TANDEM_HOME"] == "/var/lib/tandem"
    assert str(ray_folder()).startswith("/tmp/")
    assert "ray:/tmp" in services["head"]["volumes"]
    for name in ("prometheus", "grafana"):
        assert "ray:/tmp:ro" in services[name]["volumes"]


def test_images_leave_out_what_only_developers_need(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCKER))
    slim = importlib.import_module("slim")
    left_out = slim.developers_packages(ROOT / "pyproject.toml")
    assert {"pytest", "mypy", "ruff", "playwright"} <= set(left_out)
    assert not {"ray", "torch", "mlflow", "anthropic"} & set(left_out), "vLLM itself asks for the last"
