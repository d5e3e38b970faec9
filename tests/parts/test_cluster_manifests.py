"""Manifests: by KubeRay's fields and its operator's rules, by Kubernetes' schemas, and by Ray's autoscaler and Serve, which read them."""

import copy
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from cluster.kuberay import ARBITER_PORT
from cluster.manifests import make_manifests, show
from cluster.pods import CONFIG_FOLDER, METRICS_PORT, SERVE_PORT
from configs.errors import ConfigError
from configs.loader import ROOT, load_chatbot, load_machine
from serve.deploy import serve_application
from tests.helpers.crds import read_schemas
from tests.helpers.kuberay_rules import broken_rules, cluster_of

Made = dict[str, list[dict[str, Any]]]
KUBERAY = {"RayCluster", "RayJob", "RayService"}
CUSTOM = KUBERAY | {"PodMonitor"}
LONGEST_NAME = "0" + "x_" * 30 + "9"
HEAD, SERVE = ("rayClusterConfig", "headGroupSpec"), ("rayClusterConfig", "workerGroupSpecs", 0)
RAY = (*HEAD, "template", "spec", "containers", 0)
NO_RIGHTS = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
CRD = """
spec:
  group: ray.io
  names: {kind: RayCluster}
  versions:
    - name: v1
      schema:
        openAPIV3Schema:
          type: object
          properties:
            apiVersion: {type: string}
            kind: {type: string}
            metadata: {type: object}
            spec:
              type: object
              required: [groups]
              properties:
                groups: {type: array, items: {type: object, properties: {replicas: {type: integer}}}}
                settings: {type: object, additionalProperties: {type: object, properties: {value: {type: string}}}}
                anything: {type: object, properties: {known: {type: string}}, x-kubernetes-preserve-unknown-fields: true}
"""


def make(*overrides: str, machine: tuple[str, ...] = ()) -> Made:
    config = load_chatbot("configs/helpdesk.yaml", overrides)
    return make_manifests(config, load_machine("kubernetes", machine), serve_application(config, 1.0, 2))


@pytest.fixture(scope="module")
def made() -> Made:
    return make()


def clusters(made: Made) -> dict[str, dict[str, Any]]:
    """The specification of each cluster, by the kind of object that it is part of, and a job's name."""
    return {entry["metadata"]["name"]: cluster_of(entry) for entry in of_kuberay(made)}


def of_kuberay(made: Made) -> list[dict[str, Any]]:
    return [entry for objects in made.values() for entry in objects if entry["kind"] in KUBERAY]


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
            if entry["kind"] == "Pod":
                found[entry["metadata"]["name"]] = {"spec": entry["spec"]}
    return found


def test_kuberays_objects_have_only_fields_that_kuberay_has(made):
    schema = Draft202012Validator(yaml.safe_load((ROOT / "tests" / "helpers" / "kuberay.yaml").read_text()))
    ours = of_kuberay(made)
    assert sorted(entry["kind"] for entry in ours) == ["RayCluster", "RayJob", "RayJob", "RayService"]
    for entry in ours:
        schema.validate(entry)
    wrong = {**ours[0], "spec": {**ours[0]["spec"], "workerGroups": []}}
    assert not schema.is_valid(wrong)


@pytest.mark.parametrize("config", ["helpdesk", "llama3_8b_lora", "llama3_8b_qlora"])
@pytest.mark.parametrize(
    ("overrides", "machine"),
    [
        ([], []),
        ([f"name={LONGEST_NAME}", "serve.scaling.use_train_cards=true"], ["deploy.serve.min_cards=0"]),
        (["train.num_workers=2", "train.batch_size=4"], ["deploy.serve.gpu=null", "deploy.train.gpu=null"]),
    ],
)
def test_kuberays_operator_refuses_none(config: str, overrides: list[str], machine: list[str]):
    chatbot = load_chatbot(f"configs/{config}.yaml", overrides)
    made = make_manifests(chatbot, load_machine("kubernetes", machine), serve_application(chatbot, 1.0, 2))
    for entry in of_kuberay(made):
        assert broken_rules(entry) == [], entry["metadata"]["name"]


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        (("ttlSecondsAfterFinished",), 60, "a job's time to live"),
        (("upgradeStrategy", "type"), "Recreate", "a service's upgrade"),
        (("rayClusterConfig", "upgradeStrategy"), {"type": "None"}, "a cluster's own upgrade"),
        (("rayClusterConfig", "rayVersion"), "2.51.1", "a Ray that has tokens"),
        (("rayClusterConfig", "authOptions", "enableK8sTokenAuth"), True, "a token of one kind"),
        ((*HEAD, "headService"), {}, "the head's service"),
        ((*HEAD, "rayStartParams", "redis-password"), "any", "variables that the operator sets"),
        ((*HEAD, "rayStartParams", "port"), "7000", "Ray's port"),
        ((*HEAD, "template", "spec", "restartPolicy"), "Always", "a pod that the autoscaler restarts"),
        ((*RAY, "env"), [{"name": "REDIS_PASSWORD"}], "variables that the operator sets"),
        ((*RAY, "ports"), [{"name": "gcs", "containerPort": 6379}], "ports that the operator looks for by name"),
        ((*RAY, "ports", 1, "containerPort"), 6379, "ports with a key of their own"),
        ((*SERVE, "minReplicas"), 3, "replicas in order"),
        ((*SERVE, "rayStartParams", "num-cpus"), "4", "resources told once"),
        ((*SERVE, "labels", "a pool"), "serve", "labels"),
        ((*SERVE, "suspend"), True, "a group that sleeps"),
    ],
)
def test_each_rule_of_the_operator_can_be_broken(made, path: tuple[str | int, ...], value: Any, rule: str):
    service = copy.deepcopy(made["rayservice.yaml"][0])
    part = service["spec"]
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    assert broken_rules(service) == [rule]


def test_a_name_that_the_operator_refuses(made):
    (service,) = made["rayservice.yaml"]
    for name in ("9chat", "Chat", "chat-", "c" * 48):
        assert broken_rules({**service, "metadata": {"name": name}}) == ["name"]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("ray_port=7000", "ray_port is 7000, and on Kubernetes must be 6379"),
        ("dashboard_port=8000", "dashboard_port is 8000, where the serve port of the head's pod is"),
        ("mlflow_port=8081", "mlflow_port is 8081, where the arbiter port of the head's pod is"),
        ("deploy.secret=a_secret", "deploy.secret"),
        ("deploy.secret=a..secret", "deploy.secret"),
    ],
)
def test_settings_that_no_pod_could_have_are_refused(setting: str, told: str):
    with pytest.raises(ConfigError, match=told):
        make(machine=(setting,))


def test_custom_resources_are_as_their_crds_have_them(made):
    if not (folder := os.environ.get("TANDEM_TEST_CRDS")):
        pytest.skip("no CRDs here: TANDEM_TEST_CRDS=FOLDER, to which .ci/run fetches them")
    schemas = read_schemas(Path(folder))
    checked = [(entry, schemas.get((entry["apiVersion"], entry["kind"]))) for objects in made.values() for entry in objects]
    assert any(schema for _, schema in checked), f"{folder} has none of {sorted(CUSTOM)}"
    for entry, schema in checked:
        if schema:
            Draft202012Validator(schema).validate(entry)


def test_a_crd_lets_through_only_what_it_names(tmp_path):
    (tmp_path / "clusters.yaml").write_text(CRD)
    (schema,) = read_schemas(tmp_path).values()
    crd = Draft202012Validator(schema)

    def is_taken(**spec) -> bool:
        return crd.is_valid({"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "any"}, "spec": spec})

    assert is_taken(groups=[{"replicas": 1}], settings={"any": {"value": ""}}, anything={"unknown": 1})
    assert not is_taken()
    assert not is_taken(groups=[], group=[])
    assert not is_taken(groups=[{"replica": 1}])
    assert not is_taken(groups=[], settings={"any": {"values": ""}})


@pytest.mark.skipif(not shutil.which("kubernetes-validate"), reason="no kubernetes-validate (a package of that name)")
def test_all_else_is_as_kubernetes_has_it(made, tmp_path):
    plain = [entry for objects in made.values() for entry in objects if entry["kind"] not in CUSTOM]
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
            assert container["securityContext"] == NO_RIGHTS, name
    for name, cluster in clusters(made).items():
        assert cluster["autoscalerOptions"]["securityContext"] == NO_RIGHTS, f"beside the head of {name}"


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


def test_only_the_head_of_a_service_is_an_address_of_its_chat(made):
    (service,) = made["rayservice.yaml"]
    told = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert (told["proxy_location"], told["http_options"]["port"]) == ("HeadOnly", SERVE_PORT)
    for name, pod in pods(made).items():
        probe = pod["spec"]["containers"][0].get("readinessProbe", {})
        asks_proxy = probe.get("httpGet") == {"path": "/-/healthz", "port": SERVE_PORT}
        assert asks_proxy == (name == "chat-helpdesk-serve"), name


def test_a_service_has_train_cards_only_where_engines_may_take_them(made):
    assert [group["groupName"] for group in clusters(made)["chat-helpdesk"]["workerGroupSpecs"]] == ["serve"]
    assert [group["groupName"] for group in clusters(made)["tandem"]["workerGroupSpecs"]] == ["serve", "train"]
    both = clusters(make("serve.scaling.use_train_cards=true"))["chat-helpdesk"]["workerGroupSpecs"]
    assert [group["groupName"] for group in both] == ["serve", "train"]


def test_prometheus_finds_every_agent_and_arbiter_and_takes_their_names_as_ours_does(made):
    (monitor,) = made["monitoring.yaml"]
    agents, arbiter = monitor["spec"]["podMetricsEndpoints"]
    for name, cluster in clusters(made).items():
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            is_head = group is cluster["headGroupSpec"]
            ports = {port["name"]: port["containerPort"] for port in group["template"]["spec"]["containers"][0]["ports"]}
            assert ports[agents["port"]] == int(group["rayStartParams"]["metrics-export-port"]) == METRICS_PORT, name
            assert ports.get(arbiter["port"]) == (ARBITER_PORT if is_head else None), name
            assert len(set(ports.values())) == len(ports), name
            assert monitor["spec"]["selector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
    (scraped,) = yaml.safe_load((ROOT / "cluster/deploy/monitoring/prometheus.yml").read_text())["scrape_configs"]
    (ours,), (kubernetes,) = scraped["metric_relabel_configs"], agents["metricRelabelings"]
    assert list(kubernetes.values()) == [ours[key] for key in ("source_labels", "regex", "target_label", "replacement")]


def test_a_pod_to_restore_in_has_the_disks_of_mlflow_and_of_all_heads(made):
    (pod,) = made["restore.yaml"]
    (mlflow,) = [entry for entry in made["ground.yaml"] if entry["kind"] == "StatefulSet" and entry["metadata"]["name"] == "tandem-mlflow"]
    disk = f"{mlflow['spec']['volumeClaimTemplates'][0]['metadata']['name']}-tandem-mlflow-0"
    assert [volume["persistentVolumeClaim"]["claimName"] for volume in pod["spec"]["volumes"]] == ["tandem-storage", disk]
    homes = pod["spec"]["containers"][0]["volumeMounts"][0]["subPath"]
    head = clusters(made)["chat-helpdesk"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"name": "storage", "mountPath": "/var/lib/tandem", "subPath": f"{homes}/chat-helpdesk"} in head["volumeMounts"]


def test_ray_takes_redis_password_from_no_variable():
    """Else it would not be among the arguments: see `cluster.kuberay.head_arguments`."""
    from ray.scripts.scripts import start

    (option,) = [option for option in start.params if option.name == "redis_password"]
    assert option.envvar is None


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
    assert files == {file.name for file in (ROOT / "cluster" / "deploy" / "kuberay").iterdir()}
    assert files >= {"ground.yaml", "raycluster.yaml", "rayjob-train.yaml", "rayjob-tune.yaml", "rayservice.yaml"}
    for name in files:
        told = (tmp_path / "out" / name).read_text()
        kept = (ROOT / "cluster" / "deploy" / "kuberay" / name).read_text()
        assert told == kept, "python -m cluster manifests configs/helpdesk.yaml --out cluster/deploy/kuberay"
    refused = command("cluster", "manifests", "configs/helpdesk.yaml", "train.lora.rank=99")
    assert refused.status == 2
    refused = command("cluster", "manifests", "configs/helpdesk.yaml", "--out", str(tmp_path / "out" / "ground.yaml"))
    assert (refused.status, "name another --out" in refused.err) == (2, True)
