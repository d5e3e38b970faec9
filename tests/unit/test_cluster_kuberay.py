"""What a pod of KubeRay's hands on to Ray, and that nothing else does."""

from cluster import kuberay
from cluster.parts import parts_of
from cluster.session import Session
from configs.schema import MachineConfig

START = (
    "ray start --head  --no-monitor  --redis-password=$REDIS_PASSWORD  --dashboard-host=0.0.0.0  --labels=pool=serve "
    "--metrics-export-port=8080  --block "
)


def test_elsewhere_nothing_changes(monkeypatch):
    monkeypatch.delenv(kuberay.START_COMMAND, raising=False)
    monkeypatch.setenv("RAY_REDIS_ADDRESS", "somebody's:6379")
    monkeypatch.setenv(kuberay.HEAD_ADDRESS, "head.default.svc")
    assert kuberay.pod_environment() == {}
    assert kuberay.head_arguments() == kuberay.raylet_arguments() == []
    assert kuberay.arbiter_port() == 0
    assert kuberay.lasting("10.0.0.1:6379") == "10.0.0.1:6379"


def test_a_pod_hands_on_the_heads_state_and_the_autoscaler_but_no_flag_that_is_ours(monkeypatch):
    monkeypatch.setenv(kuberay.START_COMMAND, START)
    monkeypatch.setenv("REDIS_PASSWORD", "hidden")
    monkeypatch.setenv("RAY_REDIS_ADDRESS", "tandem-redis:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ours comes from TANDEM_TOKEN")
    monkeypatch.setenv("RAY_ADDRESS", "head.default.svc:6379")
    monkeypatch.setenv(kuberay.HEAD_ADDRESS, "head.default.svc")
    assert kuberay.head_arguments() == ["--no-monitor", "--redis-password=hidden"]
    assert kuberay.raylet_arguments() == ["--metrics-export-port=8080"]
    assert kuberay.arbiter_port() == kuberay.ARBITER_PORT
    assert kuberay.pod_environment().items() >= {"RAY_REDIS_ADDRESS": "tandem-redis:6379"}.items()
    assert not {"RAY_AUTH_TOKEN", "RAY_ADDRESS"} & kuberay.pod_environment().keys()
    assert kuberay.lasting("10.0.0.1:6379") == "head.default.svc:6379"


def test_a_pods_raylet_shows_its_metrics_where_kuberay_says(monkeypatch):
    def head() -> list[str]:
        machine = MachineConfig(listen_host="10.0.0.1", cards=[])
        return next(command for name, command, _ in parts_of(machine, [], Session((), (), "", "", "")) if name == "head")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert not [word for word in head() if "metrics" in word]
    monkeypatch.setenv(kuberay.START_COMMAND, START)
    assert [word for word in head() if "metrics" in word] == ["--metrics-export-port=8080"]
