"""What KubeRay tells a pod that starts Ray by itself: the state to go on with in Redis, an autoscaler beside the head, ports of metrics.

Knows the variables that KubeRay sets. Does not know Kubernetes.
"""

import os
import shlex
from collections.abc import Collection

START_COMMAND = "KUBERAY_GEN_RAY_START_CMD"  # what KubeRay would have started
HEAD_ADDRESS = "FQ_RAY_IP"  # the head's name in the network, which outlives its pod
OF_EACH, OF_HEAD = ("--metrics-export-port",), ("--no-monitor", "--redis-password", "--redis-username")
ARBITER_PORT = 8081  # where the arbiter shows its metrics: in a pod there is nobody to ask which port was free
OURS = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED")


def is_in_pod() -> bool:
    """Whether this is a pod of KubeRay's."""
    return START_COMMAND in os.environ


def pod_environment() -> dict[str, str]:
    """Return the variables that Ray's processes must have in a pod of KubeRay's; none elsewhere."""
    if not is_in_pod():
        return {}
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_") and name not in OURS}


def lasting(address: str) -> str:
    """Return an address of the head by the name that outlives its pod; elsewhere as it is."""
    name = os.environ.get(HEAD_ADDRESS) if is_in_pod() else None
    return f"{name}:{address.rpartition(':')[2]}" if name else address


def arbiter_port() -> int:
    """Return the port of the arbiter's metrics: a known one in a pod, elsewhere 0, which is any that is free."""
    return ARBITER_PORT if is_in_pod() else 0


def raylet_arguments() -> list[str]:
    """Return what KubeRay wants every `ray start` to be told; nothing elsewhere."""
    return _taken(OF_EACH)


def head_arguments() -> list[str]:
    """Return what KubeRay wants `ray start --head` to be told; nothing elsewhere.

    Redis' password is among them: Ray 2.60 takes it in no other way, and itself hands it on to its processes as an argument. In a pod
    those who can list them are the user who has it in the environment anyway.
    """
    return _taken(OF_HEAD)


def _taken(flags: Collection[str]) -> list[str]:
    words = shlex.split(os.environ.get(START_COMMAND, ""))
    return [os.path.expandvars(word) for word in words if word.partition("=")[0] in flags]
