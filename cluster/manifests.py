"""Kubernetes manifests for KubeRay, from a chatbot's config and a machine's: a cluster, jobs that train and tune, a service that chats.

Knows Kubernetes' objects and those of KubeRay 1.6, the first that takes the token from a Secret of ours, and labels and resources of a
group. Each pod's command is one of ours (`cluster.foreground`), so no flag of Ray's stands here.
Does not talk to Kubernetes.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from cluster.home import write_text, writing
from cluster.pods import (
    APP,
    CONFIG_FOLDER,
    CONFIGS,
    DISK,
    METRICS_PORT,
    MLFLOW_PORT,
    SERVE_PORT,
    STORAGE,
    Object,
    labelled,
    mlflow_pod,
    no_rights,
    pod,
    redis_pod,
    restore_pod,
    secret_value,
    submitter_pod,
)
from configs.errors import ConfigError, last_lines
from configs.schema import ChatbotConfig, DeployConfig, MachineConfig, PoolConfig

START_PARAMETERS = {"metrics-export-port": str(METRICS_PORT)}  # for `ray start`, which our pods hear of from KubeRay
MAX_NAME_LETTERS = 40  # KubeRay adds to it, and a name on Kubernetes has at most 63
IDLE_S = 300
REGISTRY_GIB = 20
REDIS_GIB = 1
ENDED_JOB_STAYS_S = 3600
Serve = Mapping[str, Any]
Pools = Mapping[str, PoolConfig]


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Write what stands in two places twice, as people do."""
        return True


def make_manifests(config: ChatbotConfig, machine: MachineConfig, application: Serve) -> dict[str, list[Object]]:
    """Return the objects of each file, by its name.

    Args:
        config: The chatbot.
        machine: Where it runs; its `deploy` says how.
        application: What Ray Serve is to run, as `python -m serve application` tells it.

    Raises:
        ConfigError: The machine's ports do not suit a pod of KubeRay's.
    """
    deploy, name = machine.deploy, dns_name(config.name)
    return {
        "ground.yaml": [*_configs(config, machine, name), *_storage(deploy), *_mlflow(deploy), *_redis(deploy), _walls()],
        "raycluster.yaml": [_ray_cluster(machine, name)],
        "rayjob-train.yaml": [_job("train", config, machine, name)],
        "rayjob-tune.yaml": [_job("tune", config, machine, name)],
        "rayservice.yaml": [_service(config, machine, name, application)],
        "monitoring.yaml": [_monitor()],
        "restore.yaml": [_restore(deploy)],
    }


def dns_name(name: str) -> str:
    """Return a chatbot's name as Kubernetes allows it."""
    return re.sub("[^a-z0-9]+", "-", name)[:MAX_NAME_LETTERS].strip("-")


def ask_application(config: str, overrides: Sequence[str], pool: PoolConfig) -> Serve:
    """Ask the folder `serve`, through its command line, what Ray Serve is to run; in a pod it listens for others, who need a key.

    Raises:
        ConfigError: The settings are refused there.
    """
    gpu = ["--gpu"] if pool.gpu else []
    command = [sys.executable, "-m", "serve", "application", config, *overrides, "serve.host=0.0.0.0", f"serve.port={SERVE_PORT}"]
    asked = subprocess.run([*command, "--num-cards", str(pool.max_cards), *gpu], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise ConfigError("there is nothing to serve", last_lines(asked.stderr), f"python -m configs check {config}")
    found: Serve = json.loads(asked.stdout)
    return found


def write(made: Mapping[str, list[Object]], folder: Path) -> list[Path]:
    """Write each file into a folder; return them.

    Raises:
        ClusterError: The folder cannot be written to.
    """
    with writing(folder, "name another --out"):
        for name, objects in made.items():
            write_text(folder / name, show(objects))
    return [folder / name for name in made]


def show(objects: list[Object]) -> str:
    """Write objects as YAML, one document each."""
    return yaml.dump_all(objects, Dumper=_Plain, sort_keys=False, width=140)


def _ray_cluster(machine: MachineConfig, name: str) -> Object:
    made = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": APP}}
    made["spec"] = _cluster(machine, {"serve": machine.deploy.serve, "train": machine.deploy.train}, APP, name, has_redis=True)
    _overwrite_commands(made)
    return made


def _service(config: ChatbotConfig, machine: MachineConfig, name: str, application: Serve) -> Object:
    deploy, home = machine.deploy, f"chat-{name}"
    # Nothing trains there: train cards are for engines, where those may have them, or not at all.
    pools = {"serve": deploy.serve, **({"train": deploy.train} if config.serve.scaling.use_train_cards else {})}
    made = {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": home}}
    made["spec"] = {
        # An upgrade beside the old engines would want twice the cards.
        "upgradeStrategy": {"type": "None"},
        "serveConfigV2": yaml.safe_dump(dict(application), sort_keys=False),
        "rayClusterConfig": _cluster(machine, pools, home, name, has_redis=True, serves=True),
    }
    _overwrite_commands(made)
    return made


def _overwrite_commands(made: Object) -> None:
    """Have KubeRay leave the pods' commands as they are."""
    made["metadata"]["annotations"] = {"ray.io/overwrite-container-cmd": "true"}


def _cluster(machine: MachineConfig, pools: Pools, home: str, config: str, has_redis: bool, serves: bool = False) -> Object:
    """Return a cluster's specification; `home` names the folder of the shared volume where its head keeps what it knows."""
    deploy = machine.deploy
    made: Object = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token", "secretName": deploy.secret},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": IDLE_S, "upscalingMode": "Default", "securityContext": no_rights()},
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": START_PARAMETERS,
            "template": pod("head", machine, config, home=home),
        },
        "workerGroupSpecs": [_group(machine, pool, settings, config, serves) for pool, settings in pools.items()],
    }
    if has_redis:
        password = {"valueFrom": {"secretKeyRef": {"name": deploy.secret, "key": "redis_password"}}}
        made["gcsFaultToleranceOptions"] = {"redisAddress": f"{APP}-redis:6379", "redisPassword": password}
    return made


def _group(machine: MachineConfig, pool: str, settings: PoolConfig, config: str, serves: bool) -> Object:
    """Return a pool's pods. Labels and resources are told twice: here for the autoscaler, which has no pod yet, and by each pod for Ray."""
    return {
        "groupName": pool,
        "replicas": settings.min_cards,
        "minReplicas": settings.min_cards,
        "maxReplicas": settings.max_cards,
        "labels": {"pool": pool},
        "resources": {"card": "1", "CPU": str(settings.num_cpus), **({"GPU": "1"} if settings.gpu else {})},
        "rayStartParams": START_PARAMETERS,
        "template": pod(pool, machine, config, settings=settings, serves=serves),
    }


def _job(module: str, config: ChatbotConfig, machine: MachineConfig, name: str) -> Object:
    num_cards, train = config.train.num_workers, machine.deploy.train
    # A job's own cluster trains, and does nothing else.
    pools = {"train": train.model_copy(update={"min_cards": num_cards, "max_cards": max(num_cards, train.max_cards)})}
    made = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": f"{module}-{name}"}}
    made["spec"] = {
        "entrypoint": f"python -m {module} {CONFIG_FOLDER}/chatbot.yaml",
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": submitter_pod(machine.deploy),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": ENDED_JOB_STAYS_S,
        "rayClusterSpec": _cluster(machine, pools, f"{module}-{name}", name, has_redis=False),
    }
    _overwrite_commands(made)
    return made


def _configs(config: ChatbotConfig, machine: MachineConfig, name: str) -> list[Object]:
    told = machine.model_dump(mode="json", exclude_defaults=True, exclude={"cards", "deploy", "name", "listen_host"}) | {"storage": STORAGE}
    chatbot = config.model_dump(mode="json", exclude_unset=True)
    data = {key: yaml.safe_dump(value, sort_keys=False) for key, value in (("chatbot.yaml", chatbot), ("machine.yaml", told))}
    return [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": labelled(f"{APP}-{name}", CONFIGS), "data": data}]


def _storage(deploy: DeployConfig) -> list[Object]:
    chosen = {"storageClassName": deploy.storage_class} if deploy.storage_class else {}
    claim = {"accessModes": ["ReadWriteMany"], **chosen, "resources": {"requests": {"storage": f"{deploy.storage_gib}Gi"}}}
    return [
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": labelled(f"{APP}-storage", "storage"), "spec": claim},
    ]


def _mlflow(deploy: DeployConfig) -> list[Object]:
    return _stateful("mlflow", mlflow_pod(deploy), MLFLOW_PORT, REGISTRY_GIB)


def _redis(deploy: DeployConfig) -> list[Object]:
    return _stateful("redis", redis_pod(secret_value(deploy, "redis_password")), 6379, REDIS_GIB)


def _stateful(part: str, template: Object, port: int, size_gib: int) -> list[Object]:
    """Return one pod with a disk of its own, and its name in the network."""
    name = f"{APP}-{part}"
    metadata = labelled(name, part)
    service = {"selector": metadata["labels"], "ports": [{"name": part, "port": port, "targetPort": port}]}
    disk = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": f"{size_gib}Gi"}}}
    stateful = {
        "serviceName": name,
        "replicas": 1,
        "selector": {"matchLabels": metadata["labels"]},
        "template": {"metadata": {"labels": metadata["labels"]}, **template},
        "volumeClaimTemplates": [{"metadata": {"name": DISK}, "spec": disk}],
    }
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
        {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata, "spec": stateful},
    ]


def _walls() -> Object:
    """Let nobody but Tandem's own pods reach MLflow, which asks for no key, and Redis."""
    ours = {"matchLabels": {"app.kubernetes.io/part-of": APP}}
    guarded = {"matchExpressions": [{"key": "app.kubernetes.io/component", "operator": "In", "values": ["mlflow", "redis"]}]}
    rules = {"podSelector": guarded, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": ours}]}]}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": labelled(f"{APP}-walls", "walls"), "spec": rules}


def _monitor() -> Object:
    """Tell Prometheus' operator where Ray's agents and the arbiter show their metrics, by the names that rules and boards ask for."""
    ours = {"sourceLabels": ["__name__"], "regex": "ray_(tandem_.+)", "targetLabel": "__name__", "replacement": "$1"}
    whose = {"sourceLabels": ["__meta_kubernetes_pod_label_ray_io_cluster"], "targetLabel": "cluster"}
    endpoints = [
        {"port": "metrics", "relabelings": [{"targetLabel": "job", "replacement": "ray"}, whose], "metricRelabelings": [ours]},
        {"port": "arbiter", "relabelings": [{"targetLabel": "job", "replacement": "arbiter"}, whose]},
    ]
    spec = {"selector": {"matchLabels": {"app.kubernetes.io/part-of": APP}}, "podMetricsEndpoints": endpoints}
    return {"apiVersion": "monitoring.coreos.com/v1", "kind": "PodMonitor", "metadata": labelled(APP, "monitoring"), "spec": spec}


def _restore(deploy: DeployConfig) -> Object:
    spec = restore_pod(deploy, f"{DISK}-{APP}-mlflow-0")
    return {"apiVersion": "v1", "kind": "Pod", "metadata": labelled(f"{APP}-restore", "restore"), "spec": spec}
