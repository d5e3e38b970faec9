"""What a pod of KubeRay's hands on to Ray, and that nothing else does."""

from cluster import kuberay

START = "ray start --head  --no-monitor  --redis-password=$REDIS_PASSWORD  --dashboard-host=0.0.0.0  --labels=pool=serve --block "


def test_elsewhere_nothing_changes(monkeypatch):
    monkeypatch.delenv(kuberay.START_COMMAND, raising=False)
    monkeypatch.setenv("RAY_REDIS_ADDRESS", "somebody's:6379")
    monkeypatch.setenv(kuberay.HEAD_ADDRESS, "head.default.svc")
    assert kuberay.pod_environment() == {}
    assert kuberay.head_arguments() == []
    assert kuberay.lasting("10.0.0.1:6379") == "10.0.0.1:6379"


def test_a_pod_hands_on_the_heads_state_and_the_autoscaler_but_no_flag_that_is_ours(monkeypatch):
    monkeypatch.setenv(kuberay.START_COMMAND, START)
    monkeypatch.setenv("REDIS_PASSWORD", "hidden")
    monkeypatch.setenv("RAY_REDIS_ADDRESS", "tandem-redis:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ours comes from TANDEM_TOKEN")
    monkeypatch.setenv("RAY_ADDRESS", "head.default.svc:6379")
    monkeypatch.setenv(kuberay.HEAD_ADDRESS, "head.default.svc")
    assert kuberay.head_arguments() == ["--no-monitor", "--redis-password=hidden"]
    assert kuberay.pod_environment().items() >= {"RAY_REDIS_ADDRESS": "tandem-redis:6379"}.items()
    assert not {"RAY_AUTH_TOKEN", "RAY_ADDRESS"} & kuberay.pod_environment().keys()
    assert kuberay.lasting("10.0.0.1:6379") == "head.default.svc:6379"
