"""A real Prometheus looks at the running stack: the table of metrics is what is shown, and every query of rules and boards has an answer.

Most of what is counted was done by the tests before; what is forgotten a minute later is done here once more.
"""

import json
import shutil

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.cards import find_gpus
from cluster.metrics import NODE, OURS, PREFIX, SUFFIXES, TABLE, VLLM, Metric
from tests.helpers.prometheus import Prometheus, board_queries, own_prometheus, rule_expressions
from tests.ray.stack import Stack, wait_for

pytestmark = pytest.mark.skipif(not shutil.which("prometheus"), reason="this machine has no Prometheus")
ON_GPUS = ("gpu", "gram")
MADE_BY = {"tandem_gate": "test_5_gate.py", "steps_lost": "test_2_training.py"}
OF_RAY = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "ReplicaId", "engine", "le", "RayNodeType", "IsHeadNode"}
OF_OTEL = "otel_scope_"


def is_for_gpus(text: str) -> bool:
    return not find_gpus() and any(word in text for word in ON_GPUS)


def be_busy(stack: Stack, config, model: str, secret: str) -> None:
    """Train, stream, use a key with a quota, and be refused."""
    run = stack.begin("train", str(config), "name=measured")
    metered = stack.make_key("metered", "--rpm", "50", "--tpm", "100000")
    for name in ("guide", model):
        for key in (metered, secret):
            assert stack.ask(name, secret=key, stream=True, ignore_eos=True).status_code == 200
    assert stack.ask("nobody", secret=metered).status_code == 404
    assert stack.ask("guide").status_code == 401
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said


@pytest.fixture(scope="module")
def prometheus(stack: Stack, config, live_guide, tiny_model, secret, tmp_path_factory):
    with own_prometheus(tmp_path_factory.mktemp("prometheus"), stack.home) as prometheus:
        be_busy(stack, config, tiny_model.name, secret)
        # What was measured is on its way for half a minute, and a rate wants to see it come.
        for expected in ("tandem_quota_used_ratio", "tandem_train_eval_loss", "tandem:requests_failed:ratio_rate5m"):
            wait_for(lambda query=expected: prometheus.query(query))
        yield prometheus


def needs(request: pytest.FixtureRequest, text: str) -> None:
    """Skip what only another file of tests makes, if that file is not among those that run."""
    files = {item.path.name for item in request.session.items}
    for word, file in MADE_BY.items():
        if word in text and file not in files:
            pytest.skip(f"{file} was not run")


@pytest.fixture(scope="module")
def shown(stack: Stack, prometheus: Prometheus) -> dict[str, list]:
    """What is shown by all targets, by name, as their own text says it."""
    files = [stack.home / "monitoring" / name for name in ("ray.json", "arbiter.json")]
    targets = [target for file in files for entry in json.loads(file.read_text()) for target in entry["targets"]]
    families = [family for target in targets for family in text_string_to_metric_families(httpx.get(f"http://{target}/metrics").text)]
    found: dict[str, list] = {}
    for family in families:
        found.setdefault(family.name.removeprefix(PREFIX), []).append(family)
    return found


def test_all_targets_are_up(prometheus: Prometheus):
    targets = prometheus.get("targets")["activeTargets"]
    assert {target["labels"]["job"] for target in targets} == {"ray", "arbiter"}
    assert [target["lastError"] for target in targets if target["health"] != "up"] == []


@pytest.mark.parametrize("metric", TABLE, ids=lambda metric: metric.name)
def test_the_table_is_what_is_shown(request, prometheus: Prometheus, shown, metric: Metric):
    needs(request, metric.name)
    if is_for_gpus(metric.name):
        pytest.skip("there is no GPU")
    families = shown.get(metric.name.removeprefix(PREFIX).removesuffix("_total" if metric.kind == "counter" else "\0"), [])
    assert families, f"{metric.name} is not shown"
    assert {family.type for family in families} == {metric.kind}
    if metric.shown_by in OURS:
        assert {family.documentation for family in families} == {metric.help}
    labels = {label for family in families for sample in family.samples for label in sample.labels if not label.startswith(OF_OTEL)}
    if metric.shown_by == NODE:
        assert labels >= set(metric.labels)
    else:
        assert labels - OF_RAY == set(metric.labels)
    suffix = "_count" if metric.kind == "histogram" else ""
    assert prometheus.query(f"{metric.name}{suffix}"), "and Prometheus knows it by the table's name"


def test_nothing_of_ours_is_shown_that_is_not_in_the_table(prometheus: Prometheus):
    ours = {name for name in prometheus.names() if name.startswith(("tandem_", f"{PREFIX}tandem_", f"{PREFIX}vllm_"))}
    stems = {name.removesuffix(suffix) for name in ours for suffix in SUFFIXES if name.endswith(suffix)} | {
        name for name in ours if not name.endswith(SUFFIXES)
    }
    assert stems <= {metric.name for metric in TABLE if metric.shown_by in (*OURS, VLLM)}


def test_labels_are_names_that_we_gave(prometheus: Prometheus):
    assert "measured" in prometheus.get("label/chatbot/values")
    assert {"metered", "none"} <= set(prometheus.get("label/key/values"))
    assert "nobody" not in str(prometheus.get("label/model/values"))
    assert prometheus.query('tandem_requests_total{key="metered", route="/v1/chat/completions", status="404"}')
    assert prometheus.query('tandem_requests_total{key="none", status="401"}')


def test_first_tokens_are_split_into_framework_and_engine(prometheus: Prometheus):
    for metric in ("tandem_first_token_seconds", "tandem_per_token_seconds"):
        counted = {entry["metric"]["part"]: float(entry["value"][1]) for entry in prometheus.query(f"sum by (part) ({metric}_count)")}
        assert counted["whole"] >= counted["engine"] == counted["framework"] > 0


@pytest.mark.parametrize(("place", "query", "needs_gpu"), list(board_queries()))
def test_every_panel_has_data(request, prometheus: Prometheus, place, query, needs_gpu):
    needs(request, query)
    if needs_gpu and not find_gpus():
        assert prometheus.query(query) == []
        pytest.skip("there is no GPU")
    assert prometheus.query(query), place


@pytest.mark.parametrize(("name", "expression"), list(rule_expressions(as_data=True)))
def test_every_rule_has_data(request, prometheus: Prometheus, name, expression):
    needs(request, expression)
    if is_for_gpus(expression):
        pytest.skip("there is no GPU")
    assert prometheus.query(expression), name


def test_rules_are_evaluated_without_an_error_and_no_card_is_gone(prometheus: Prometheus):
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(list(rule_expressions()))
    assert [rule["lastError"] for rule in rules if rule["health"] == "err"] == []
    firing = {alert["labels"]["alertname"] for alert in prometheus.get("alerts")["alerts"]}
    assert not firing & {"CardGone", "MetricsGone"}


def test_ray_has_made_its_boards(stack: Stack):
    titles = {json.loads(file.read_text())["title"] for file in (stack.home / "monitoring" / "ray_boards").glob("*.json")}
    assert any("Serve" in title for title in titles), titles
