"""What KubeRay tells a pod that starts Ray by itself: the state to go on with in Redis, and that an autoscaler runs beside the head.

Knows the variables that KubeRay sets. Does not know Kubernetes.
"""

import os
import shlex

START_COMMAND = "KUBERAY_GEN_RAY_START_CMD"  # what KubeRay would have started
HEAD_ADDRESS = "FQ_RAY_IP"  # the head's name in the network, which outlives its pod
TAKEN = ("--no-monitor", "--redis-password", "--redis-username")
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


def head_arguments() -> list[str]:
    """Return what KubeRay wants `ray start --head` to be told; nothing elsewhere."""
    words = shlex.split(os.environ.get(START_COMMAND, ""))
    wanted = [word for word in words if word.partition("=")[0] in TAKEN]
    return [os.path.expandvars(word) for word in wanted]
