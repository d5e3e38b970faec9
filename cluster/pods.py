"""The pods of the manifests: the head, a card of a pool, MLflow, Redis, and one for backups; none is root, or has a right without need.

Knows Kubernetes' pod templates. Does not know KubeRay's objects: see `cluster.manifests`.
"""

from typing import Any

from cluster.kuberay import ARBITER_PORT
from configs.errors import ConfigError
from configs.schema import DeployConfig, MachineConfig, PoolConfig

Object = dict[str, Any]
APP = "tandem"
CONFIGS = "config"
CONFIG_FOLDER = "/etc/tandem"
HOME, STORAGE, CACHE = "/var/lib/tandem", "/var/lib/tandem-storage", "/var/cache/tandem"
HOMES = "homes"  # of heads, a folder each of the shared volume
DISK = "disk"  # of MLflow and of Redis, one each
MLFLOW_PORT, SERVE_PORT, METRICS_PORT, RAY_PORT = 5000, 8000, 8080, 6379
REDIS_IMAGE = "redis:8-alpine"
USER_ID, REDIS_USER_ID = 10001, 999
HEAD_CPUS, HEAD_MEMORY_GIB = 2, 8
SHARED_MEMORY_GIB = 2  # for Ray's objects, over what a container has without asking


def labelled(name: str, component: str) -> Object:
    """Return metadata with the labels by which our objects know each other."""
    return {"name": name, "labels": {"app.kubernetes.io/part-of": APP, "app.kubernetes.io/component": component}}


def pod(
    part: str, machine: MachineConfig, config: str, *, settings: PoolConfig | None = None, home: str | None = None, serves: bool = False
) -> Object:
    """Return the template of the head, or of a card's pod.

    Args:
        part: `head`, or the pool.
        machine: Its ports, and its `deploy`.
        config: The name of the chatbot whose settings are mounted.
        settings: What a card's pod has; None for the head.
        home: The folder of the shared volume that is the head's home; a card's pod has none that outlives it.
        serves: Whether it is a card of a RayService.
    """
    deploy = machine.deploy
    if settings is None:
        command = ["head", f"{CONFIG_FOLDER}/machine.yaml", "cards=[]"]
        limits, ports = _limits(HEAD_CPUS, HEAD_MEMORY_GIB, None), _ports_of_head(machine)
    else:
        gpu = ", gpu: 0" if settings.gpu else ""
        command = ["card", f"{CONFIG_FOLDER}/machine.yaml", f"cards=[{{pool: {part}{gpu}}}]"]
        limits, ports = _limits(settings.num_cpus, settings.memory_gib, settings.gpu), {"metrics": METRICS_PORT}
    container: Object = {
        "name": "ray-head" if settings is None else "ray-worker",
        "image": deploy.head_image if settings is None else deploy.image,
        "command": ["python", "-m", "cluster", "run", *command],
        "env": [{"name": "MLFLOW_TRACKING_URI", "value": f"http://{APP}-mlflow:{MLFLOW_PORT}"}, *_secrets(deploy)],
        "envFrom": [{"secretRef": {"name": f"{deploy.secret}-environment", "optional": True}}],
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "resources": {"requests": limits, "limits": limits},
        "volumeMounts": _mounts(home),
        **_probes(["python", "-m", "cluster", "healthy"]),
        **({"readinessProbe": _answers_as_proxy()} if serves else {}),
        "securityContext": no_rights(),
    }
    volumes = [
        {"name": "storage", "persistentVolumeClaim": {"claimName": f"{APP}-storage"}},
        {"name": "config", "configMap": {"name": f"{APP}-{config}"}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{SHARED_MEMORY_GIB}Gi"}},
        *([{"name": "home", "emptyDir": {}}] if home is None else []),
    ]
    spec = {**_as_nobody(USER_ID), "containers": [container], "volumes": volumes}
    if settings is not None:
        spec["automountServiceAccountToken"] = False  # the head has one, for the autoscaler beside it
        if settings.node_labels:
            spec["nodeSelector"] = settings.node_labels
    return {"metadata": {"labels": labelled("", part)["labels"]}, "spec": spec}


def mlflow_pod(deploy: DeployConfig) -> Object:
    """Return the template of MLflow's pod, with what it keeps on a disk of its own."""
    limits = _limits(1, 2, None)
    container = {
        "name": "mlflow",
        "image": deploy.head_image,
        "command": ["python", "-m", "cluster", "run", "mlflow"],
        "env": [{"name": "MLFLOW_SERVER_ALLOWED_HOSTS", "value": f"{APP}-mlflow:{MLFLOW_PORT}"}],
        "ports": [{"name": "mlflow", "containerPort": MLFLOW_PORT}],
        "resources": {"requests": limits, "limits": limits},
        "volumeMounts": [{"name": DISK, "mountPath": HOME}],
        "readinessProbe": {"tcpSocket": {"port": MLFLOW_PORT}, "periodSeconds": 10},
        "livenessProbe": {"tcpSocket": {"port": MLFLOW_PORT}, "periodSeconds": 30, "initialDelaySeconds": 60, "failureThreshold": 5},
        "securityContext": no_rights(),
    }
    return {"spec": {**_as_nobody(USER_ID), "automountServiceAccountToken": False, "containers": [container]}}


def redis_pod(password: Object) -> Object:
    """Return the template of the pod where Ray's head keeps what must outlive it."""
    container = {
        "name": "redis",
        "image": REDIS_IMAGE,
        # Through standard input: a password among the arguments is seen by whoever lists processes.
        "command": ["sh", "-c", 'printf "requirepass %s\\nappendonly yes\\ndir /data\\n" "$REDIS_PASSWORD" | exec redis-server -'],
        "env": [{"name": "REDIS_PASSWORD", "valueFrom": password}],
        "ports": [{"name": "redis", "containerPort": 6379}],
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
        "volumeMounts": [{"name": DISK, "mountPath": "/data"}],
        "readinessProbe": {"tcpSocket": {"port": 6379}, "periodSeconds": 10},
        "securityContext": no_rights(),
    }
    return {"spec": {**_as_nobody(REDIS_USER_ID), "automountServiceAccountToken": False, "containers": [container]}}


def restore_pod(deploy: DeployConfig, mlflow_disk: str) -> Object:
    """Return a pod in which backups are put back: it has the homes of all heads and MLflow's, and nothing runs there."""
    limits = _limits(1, 2, None)
    container = {
        "name": "restore",
        "image": deploy.head_image,
        "command": ["sleep", "infinity"],
        "env": [{"name": "TANDEM_HOME", "value": "/to-be-named"}],  # that of the image is on no disk here, and would be lost
        "resources": {"requests": limits, "limits": limits},
        "volumeMounts": [
            {"name": "storage", "mountPath": f"/{HOMES}", "subPath": HOMES},
            {"name": "mlflow", "mountPath": "/mlflow"},
        ],
        "securityContext": no_rights(),
    }
    volumes = [
        {"name": "storage", "persistentVolumeClaim": {"claimName": f"{APP}-storage"}},
        {"name": "mlflow", "persistentVolumeClaim": {"claimName": mlflow_disk}},
    ]
    return {**_as_nobody(USER_ID), "automountServiceAccountToken": False, "containers": [container], "volumes": volumes}


def submitter_pod(deploy: DeployConfig) -> Object:
    """Return the template of the pod in which KubeRay submits a job; KubeRay fills in the command."""
    limits = _limits(1, 1, None)
    container = {
        "name": "submitter",
        "image": deploy.head_image,
        "resources": {"requests": limits, "limits": limits},
        "securityContext": no_rights(),
    }
    return {"spec": {**_as_nobody(USER_ID), "restartPolicy": "Never", "containers": [container]}}


def secret_value(deploy: DeployConfig, key: str) -> Object:
    """Return where a value of our Secret is, as `valueFrom` takes it."""
    return {"secretKeyRef": {"name": deploy.secret, "key": key}}


def _ports_of_head(machine: MachineConfig) -> dict[str, int]:
    """Return the ports of the head's pod.

    Raises:
        ConfigError: One is told twice, or Ray's is not where KubeRay's parts of the pods look for it.
    """
    if machine.ray_port != RAY_PORT:
        why = "KubeRay's autoscaler beside the head looks for Ray there, and what holds a card's pod until the head is up"
        raise ConfigError(f"ray_port is {machine.ray_port}, and on Kubernetes must be {RAY_PORT}", why, "leave ray_port out")
    ours = {"serve": SERVE_PORT, "arbiter": ARBITER_PORT, "metrics": METRICS_PORT}
    for setting, port in (("dashboard_port", machine.dashboard_port), ("mlflow_port", machine.mlflow_port)):
        if taken := [part for part, other in ours.items() if other == port]:
            raise ConfigError(f"{setting} is {port}, where the {taken[0]} port of the head's pod is", "", f"{setting}=PORT with another")
    return {"gcs": RAY_PORT, "dashboard": machine.dashboard_port, "gate": machine.mlflow_port, **ours}


def _secrets(deploy: DeployConfig) -> list[Object]:
    return [{"name": "TANDEM_TOKEN", "valueFrom": secret_value(deploy, "auth_token")}]


def _mounts(home: str | None) -> list[Object]:
    own = {"name": "home", "mountPath": HOME} if home is None else {"name": "storage", "mountPath": HOME, "subPath": f"{HOMES}/{home}"}
    return [
        own,
        {"name": "storage", "mountPath": STORAGE, "subPath": "shared"},
        {"name": "storage", "mountPath": CACHE, "subPath": "cache"},
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108 (Ray's objects lie there)
    ]


def _limits(num_cpus: int, memory_gib: int, gpu: str | None) -> Object:
    return {"cpu": str(num_cpus), "memory": f"{memory_gib}Gi", **({gpu: "1"} if gpu else {})}


def _probes(command: list[str]) -> Object:
    """Return how Kubernetes sees whether a part is there; ours, since KubeRay's ask at ports that our raylets do not have."""
    look = {"exec": {"command": command}, "timeoutSeconds": 15}
    return {
        "startupProbe": {**look, "periodSeconds": 10, "failureThreshold": 30},
        "readinessProbe": {**look, "periodSeconds": 20, "failureThreshold": 3},
        "livenessProbe": {**look, "periodSeconds": 60, "failureThreshold": 6},  # a head that moves takes minutes
    }


def _answers_as_proxy() -> Object:
    """Return what makes a pod of a RayService an address of its chat.

    KubeRay labels every worker `ray.io/serve=true`, whatever our labels say, and its serve Service sends requests to all of them that are
    ready. Serve's proxy runs on the head alone, so a worker must not be ready: as with KubeRay's own probe, which ours takes the place of.
    Nothing else asks whether a worker is ready: KubeRay deploys to a ready head, and labels that once its proxy answers.
    """
    return {"httpGet": {"path": "/-/healthz", "port": SERVE_PORT}, "timeoutSeconds": 5, "periodSeconds": 20, "failureThreshold": 1}


def _as_nobody(user_id: int) -> Object:
    rights = {"runAsNonRoot": True, "runAsUser": user_id, "runAsGroup": user_id, "fsGroup": user_id}
    return {"securityContext": {**rights, "seccompProfile": {"type": "RuntimeDefault"}}}


def no_rights() -> Object:
    """Return the security context of a container that needs no right."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
