"""Manifests: by our list of KubeRay's fields, by Kubernetes' schemas, and by Ray's own autoscaler and Serve, which read them."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from cluster.manifests import make_manifests, show
from cluster.pods import CONFIG_FOLDER
from configs.loader import ROOT, load_chatbot, load_machine
from serve.deploy import serve_application

Made = dict[str, list[dict[str, Any]]]
KUBERAY = {"RayCluster", "RayJob", "RayService"}


def make(*overrides: str, machine: tuple[str, ...] = ()) -> Made:
    config = load_chatbot("configs/helpdesk.yaml", overrides)
    return make_manifests(config, load_machine("kubernetes", machine), serve_application(config, 1.0, 2))


@pytest.fixture(scope="module")
def made() -> Made:
    return make()


def clusters(made: Made) -> dict[str, dict[str, Any]]:
    """The specification of each cluster, by the kind of object that it is part of, and a job's name."""
    objects = [entry for entries in made.values() for entry in entries if entry["kind"] in KUBERAY]
    places = {
        "RayCluster": lambda spec: spec,
        "RayJob": lambda spec: spec["rayClusterSpec"],
        "RayService": lambda spec: spec["rayClusterConfig"],
    }
    return {entry["metadata"]["name"]: places[entry["kind"]](entry["spec"]) for entry in objects}


def pods(made: Made) -> dict[str, dict[str, Any]]:
    """Every pod template."""
    found = {}
    for name, cluster in clusters(made).items():
        found[f"{name}-head"] = cluster["headGroupSpec"]["template"]
        found |= {f"{name}-{group['groupName']}": group["template"] for group in cluster["workerGroupSpecs"]}
    for objects in made.values():
        for entry in objects:
            if entry["kind"] == "RayJob":
                found[f"{entry['metadata']['name']}-submitter"] = entry["spec"]["submitterPodTemplate"]
            if entry["kind"] == "StatefulSet":
                found[entry["metadata"]["name"]] = entry["spec"]["template"]
    return found


def test_kuberays_objects_have_only_fields_that_kuberay_has(made):
    schema = Draft202012Validator(yaml.safe_load((ROOT / "tests" / "helpers" / "kuberay.yaml").read_text()))
    ours = [entry for objects in made.values() for entry in objects if entry["kind"] in KUBERAY]
    assert sorted(entry["kind"] for entry in ours) == ["RayCluster", "RayJob", "RayJob", "RayService"]
    for entry in ours:
        schema.validate(entry)
    wrong = {**ours[0], "spec": {**ours[0]["spec"], "workerGroups": []}}
    assert not schema.is_valid(wrong)


@pytest.mark.skipif(not shutil.which("kubernetes-validate"), reason="no kubernetes-validate (a package of that name)")
def test_all_else_is_as_kubernetes_has_it(made, tmp_path):
    plain = [entry for objects in made.values() for entry in objects if entry["kind"] not in KUBERAY]
    whole = [{"apiVersion": "v1", "kind": "Pod", **pod, "metadata": {"name": name}} for name, pod in pods(made).items()]
    (tmp_path / "all.yaml").write_text(show([*plain, *whole]))
    done = subprocess.run(["kubernetes-validate", "--strict", tmp_path / "all.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count(" passed ") == len(plain) + len(whole)


def test_no_pod_is_root_or_may_become_it(made):
    for name, pod in pods(made).items():
        rights = pod["spec"]["securityContext"]
        assert rights["runAsNonRoot"], name
        assert rights["runAsUser"] > 0, name
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}, name


def test_secrets_are_named_and_nowhere_written(made):
    for name, cluster in clusters(made).items():
        assert cluster["authOptions"] == {"mode": "token", "secretName": "tandem"}, name
    for name, pod in pods(made).items():
        for variable in [entry for container in pod["spec"]["containers"] for entry in container.get("env", [])]:
            if "TOKEN" in variable["name"] or "PASSWORD" in variable["name"]:
                assert set(variable) == {"name", "valueFrom"}, name
    assert "Secret" not in {entry["kind"] for objects in made.values() for entry in objects}


def test_rays_autoscaler_reads_pools_labels_and_cards(made):
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    (cluster,) = made["raycluster.yaml"]
    cluster = {**cluster, "metadata": {**cluster["metadata"], "namespace": "default"}}
    kinds = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    for pool in ("serve", "train"):
        assert kinds[pool]["labels"] == {"pool": pool}
        assert kinds[pool]["resources"] == {"CPU": 4, "GPU": 1, "memory": 16 * 2**30, "card": 1}
        assert (kinds[pool]["min_workers"], kinds[pool]["max_workers"]) == (1, 2)


def test_serve_takes_the_services_application(made):
    from ray.serve.schema import ServeDeploySchema

    (service,) = made["rayservice.yaml"]
    told = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert [application.import_path for application in told.applications] == ["serve.app:build"]


def test_a_job_has_the_cards_that_it_trains_on_and_no_other():
    made = make("train.num_workers=2", "train.batch_size=4")
    cluster = clusters(made)["train-helpdesk"]
    assert [(group["groupName"], group["minReplicas"]) for group in cluster["workerGroupSpecs"]] == [("train", 2)]
    (job,) = made["rayjob-tune.yaml"]
    assert job["spec"]["entrypoint"] == f"python -m tune {CONFIG_FOLDER}/chatbot.yaml"


def test_what_the_pods_mount_are_the_configs_that_were_given(made, tmp_path):
    (configs,) = [entry for entry in made["ground.yaml"] if entry["kind"] == "ConfigMap"]
    for name, text in configs["data"].items():
        (tmp_path / name).write_text(text)
    assert load_chatbot(tmp_path / "chatbot.yaml") == load_chatbot("configs/helpdesk.yaml")
    assert load_machine(tmp_path / "machine.yaml", ["listen_host=10.0.0.1", "cards=[]"]).storage == "/var/lib/tandem-storage"


def test_cards_without_a_gpu(tmp_path: Path):
    made = make(machine=("deploy.serve.gpu=null", "deploy.train.gpu=null"))
    (serve, train) = clusters(made)["tandem"]["workerGroupSpecs"]
    assert "GPU" not in serve["resources"]
    assert train["template"]["spec"]["containers"][0]["command"][-1] == "cards=[{pool: train}]"


def test_the_command_writes_a_file_for_each(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    done = command("cluster", "manifests", "configs/helpdesk.yaml", "--out", str(tmp_path / "out"))
    assert done.status == 0, done.err
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"ground.yaml", "raycluster.yaml", "rayjob-train.yaml", "rayjob-tune.yaml", "rayservice.yaml"}
    for name in files:
        told = (tmp_path / "out" / name).read_text()
        kept = (ROOT / "cluster" / "deploy" / "kuberay" / name).read_text()
        assert told == kept, "python -m cluster manifests configs/helpdesk.yaml --out cluster/deploy/kuberay"
    refused = command("cluster", "manifests", "configs/helpdesk.yaml", "train.lora.rank=99")
    assert refused.status == 2
    refused = command("cluster", "manifests", "configs/helpdesk.yaml", "--out", str(tmp_path / "out" / "ground.yaml"))
    assert (refused.status, "name another --out" in refused.err) == (2, True)
