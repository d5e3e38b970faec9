"""A real Prometheus looks at the running stack: the table of metrics is what is shown, and every query of rules and boards has an answer.

Most of what is counted was done by the tests before; what is forgotten a minute later is done here once more.
"""

import json
import re
import shutil
import time
from dataclasses import dataclass, field

import httpx
import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from cluster.cards import find_gpus
from cluster.metrics import NODE, OURS, PREFIX, SUFFIXES, TABLE, VLLM, Metric
from tests.helpers.prometheus import Prometheus, board_queries, own_prometheus, rule_expressions
from tests.ray.stack import Stack

pytestmark = pytest.mark.skipif(not shutil.which("prometheus"), reason="this machine has no Prometheus")
ON_GPUS = ("gpu", "gram")
MADE_BY = {"tandem_gate": "test_5_gate.py", "steps_lost": "test_2_training.py"}
OF_RAY = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "ReplicaId", "engine", "le", "RayNodeType", "IsHeadNode"}
OF_OTEL = "otel_scope_"
OURS_OR_NODES = re.compile(r"(# (TYPE|HELP) )?(ray_)?(tandem|vllm|node)_")
# What engines measure is on its way for half a minute, and a rate wants to see it come.
PATIENCE_S = 90
COME_LATE = (
    "tandem_train_eval_loss",
    "tandem_quota_used_ratio",
    "tandem:requests_failed:ratio_rate5m",
    "ray_vllm_prefix_cache_hits_total",
    "ray_vllm_num_requests_running",
)


def is_for_gpus(text: str) -> bool:
    return not find_gpus() and any(word in text for word in ON_GPUS)


def be_busy(stack: Stack, config, model: str, metered: str) -> None:
    """Train, stream, use a key with a quota, and be refused."""
    run = stack.begin("train", str(config), "name=measured")
    for name in ("guide", model):
        assert stack.ask(name, secret=metered, stream=True, ignore_eos=True).status_code == 200
    assert stack.ask("nobody", secret=metered).status_code == 404
    assert stack.ask("guide").status_code == 401
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said


@dataclass
class Looked:
    """What a Prometheus saw, and what the targets showed meanwhile, by name."""

    prometheus: Prometheus
    shown: dict[str, list[Family]] = field(default_factory=dict)

    def look(self, stack: Stack) -> None:
        """Read all targets as Prometheus does: of their thousands of lines those that the table is about."""
        files = [stack.home / "monitoring" / name for name in ("ray.json", "arbiter.json")]
        for target in {target for file in files for entry in json.loads(file.read_text()) for target in entry["targets"]}:
            lines = httpx.get(f"http://{target}/metrics").text.splitlines(keepends=True)
            for family in text_string_to_metric_families("".join(line for line in lines if OURS_OR_NODES.match(line))):
                self.shown.setdefault(family.name.removeprefix(PREFIX), []).append(family)


@pytest.fixture(scope="module")
def looked(stack: Stack, config, live_guide, tiny_model, secret, tmp_path_factory):
    """Each test says by itself what is missing after a time: one metric that does not come must not hide the others."""
    with own_prometheus(tmp_path_factory.mktemp("prometheus"), stack.home) as prometheus:
        looked, metered = Looked(prometheus), stack.make_key("metered", "--rpm", "50", "--tpm", "100000")
        be_busy(stack, config, tiny_model.name, metered)
        deadline = time.monotonic() + PATIENCE_S
        while not all(map(prometheus.seen, COME_LATE)) and time.monotonic() < deadline:
            for key in (metered, secret):  # long enough to fill a block of the cache, which is asked for it again
                assert stack.ask(tiny_model.name, "How do I start? " * 12, secret=key, stream=True, ignore_eos=True).status_code == 200
            looked.look(stack)
            time.sleep(2)
        looked.look(stack)  # what Prometheus has seen by now
        yield looked


@pytest.fixture(scope="module")
def prometheus(looked: Looked) -> Prometheus:
    return looked.prometheus


def needs(request: pytest.FixtureRequest, text: str) -> None:
    """Skip what only another file of tests makes, if that file is not among those that run."""
    files = {item.path.name for item in request.session.items}
    for word, file in MADE_BY.items():
        if word in text and file not in files:
            pytest.skip(f"{file} was not run")


def test_all_targets_are_up(prometheus: Prometheus):
    targets = prometheus.get("targets")["activeTargets"]
    assert {target["labels"]["job"] for target in targets} == {"ray", "arbiter"}
    assert [target["lastError"] for target in targets if target["health"] != "up"] == []


@pytest.mark.parametrize("metric", TABLE, ids=lambda metric: metric.name)
def test_the_table_is_what_is_shown(request, looked: Looked, metric: Metric):
    needs(request, metric.name)
    if is_for_gpus(metric.name):
        pytest.skip("there is no GPU")
    families = looked.shown.get(metric.name.removeprefix(PREFIX).removesuffix("_total" if metric.kind == "counter" else "\0"), [])
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
    assert looked.prometheus.seen(f"{metric.name}{suffix}"), "and Prometheus knows it by the table's name"


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


def test_an_engine_that_is_asked_is_wanted_and_answers(prometheus: Prometheus):
    assert prometheus.seen("tandem_engines_wanted > 0 and tandem_engines_answering > 0")


@pytest.mark.parametrize(("place", "query", "needs_gpu"), list(board_queries()))
def test_every_panel_has_data(request, prometheus: Prometheus, place, query, needs_gpu):
    needs(request, query)
    if needs_gpu and not find_gpus():
        assert prometheus.seen(query) == []
        pytest.skip("there is no GPU")
    assert prometheus.seen(query), place


@pytest.mark.parametrize(("name", "expression"), list(rule_expressions(as_data=True)))
def test_every_rule_has_data(request, prometheus: Prometheus, name, expression):
    needs(request, expression)
    if is_for_gpus(expression):
        pytest.skip("there is no GPU")
    assert prometheus.seen(expression), name


def test_rules_are_evaluated_without_an_error_and_no_card_is_gone(prometheus: Prometheus):
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(list(rule_expressions()))
    assert [rule["lastError"] for rule in rules if rule["health"] == "err"] == []
    firing = {alert["labels"]["alertname"] for alert in prometheus.get("alerts")["alerts"] if alert["state"] == "firing"}
    assert not firing & {"CardGone", "ChatGone", "ClusterUnseen", "MetricsGone"}


def test_ray_has_made_its_boards(stack: Stack):
    titles = {json.loads(file.read_text())["title"] for file in (stack.home / "monitoring" / "ray_boards").glob("*.json")}
    assert any("Serve" in title for title in titles), titles
