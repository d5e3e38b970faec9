"""What KubeRay's operator refuses although its CRDs let it through, as of release 1.6 and later, in our own words, for what we use.

Also the names and ports that the operator looks for, and lists in which Kubernetes takes each key once.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

Object = dict[str, Any]
LONGEST_NAMES = {"RayCluster": 53, "RayJob": 47, "RayService": 47}  # the last two give their cluster six letters more
LABEL = re.compile(r"([a-zA-Z0-9]([a-zA-Z0-9._-]{0,61}[a-zA-Z0-9])?)?")
FIRST_RAY_WITH_TOKENS = (2, 52)
KEYS: dict[str, Callable[[Object], object]] = {
    "containers": lambda entry: entry["name"],
    "env": lambda entry: entry["name"],
    "ports": lambda entry: (entry["containerPort"], entry.get("protocol", "TCP")),
    "volumes": lambda entry: entry["name"],
    "volumeMounts": lambda entry: entry["mountPath"],
}


def cluster_of(made: Object) -> Object:
    """Return the specification of an object's cluster."""
    places = {
        "RayCluster": lambda spec: spec,
        "RayJob": lambda spec: spec["rayClusterSpec"],
        "RayService": lambda spec: spec["rayClusterConfig"],
    }
    found: Object = places[made["kind"]](made["spec"])
    return found


def broken_rules(made: Object) -> list[str]:
    """Return why the operator would not run an object; nothing if it would."""
    kind, name, spec, cluster = made["kind"], made["metadata"]["name"], made["spec"], cluster_of(made)
    held = {
        "name": len(name) <= LONGEST_NAMES[kind] and re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", name) is not None,
        "a job's time to live": spec.get("ttlSecondsAfterFinished", 0) == 0 or spec.get("shutdownAfterJobFinishes", False),
        "a cluster's own upgrade": kind == "RayCluster" or "upgradeStrategy" not in cluster,
        "a service's upgrade": kind != "RayService" or spec.get("upgradeStrategy", {}).get("type", "None") in ("NewCluster", "None"),
        "the head's service": "headService" not in cluster["headGroupSpec"],
    }
    return [rule for rule, holds in held.items() if not holds] + [*_of_cluster(cluster)] + [*_of_groups(cluster)] + [*_twice(spec)]


def _of_cluster(cluster: Object) -> Iterator[str]:
    head = cluster["headGroupSpec"]
    (ray, *_), parameters = head["template"]["spec"]["containers"], head["rayStartParams"]
    ports, variables = {port["name"]: port["containerPort"] for port in ray["ports"]}, {entry["name"] for entry in ray["env"]}
    managed = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_enable_autoscaler_v2"} & variables
    held = {
        "variables that the operator sets": not managed and not {"redis-password", "redis-username"} & parameters.keys(),
        "a Ray that has tokens": tuple(int(part) for part in cluster["rayVersion"].split(".")[:2]) >= FIRST_RAY_WITH_TOKENS,
        "a token of one kind": cluster["authOptions"]["mode"] == "token" and not cluster["authOptions"].get("enableK8sTokenAuth"),
        "ports that the operator looks for by name": {"dashboard", "serve", "metrics"} <= ports.keys(),
        "Ray's port": 6379 in ports.values() and parameters.get("port", "6379") == "6379",
    }
    yield from (rule for rule, holds in held.items() if not holds)


def _of_groups(cluster: Object) -> Iterator[str]:
    workers = cluster["workerGroupSpecs"]
    names = [group["groupName"] for group in workers]
    if len(set(names)) < len(names):
        yield "a name for each group"
    for group in workers:
        if not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield "replicas in order"
    for group in (cluster["headGroupSpec"], *workers):
        parameters, labels = group["rayStartParams"], group.get("labels", {})
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & parameters.keys():
            yield "resources told once"
        if "labels" in parameters or not all(LABEL.fullmatch(text) for pair in labels.items() for text in pair):
            yield "labels"
        if cluster["enableInTreeAutoscaling"] and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield "a pod that the autoscaler restarts"
        if group.get("suspend"):
            yield "a group that sleeps"


def _twice(part: Any) -> Iterator[str]:
    """Yield the lists that have a key twice."""
    if isinstance(part, list):
        for entry in part:
            yield from _twice(entry)
    if isinstance(part, dict):
        for name, value in part.items():
            if name in KEYS and len({KEYS[name](entry) for entry in value}) < len(value):
                yield f"{name} with a key of their own"
            yield from _twice(value)
