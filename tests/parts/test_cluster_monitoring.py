"""The monitoring files: as the programs that read them want them, and made of metrics that there are."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.boards import BOARDS, FOLDER, files
from cluster.logs import STREAMS, stream_file
from cluster.metrics import SUFFIXES, TABLE
from tests.helpers.prometheus import board_queries, rule_expressions

NAME = re.compile(r"\b(?:tandem|ray)_[a-z0-9_]+\b")
RULE = re.compile(r"\btandem:[a-z0-9_:]+\b")
COMPONENT = re.compile(r"^([a-z]+(?:\.[a-z_]+)+) \"(\w+)\" \{$", re.MULTILINE)
REFERENCE = re.compile(r"\b((?:local|loki)\.[a-z_]+\.\w+)\.(?:targets|receiver)\b")
# Of Loki's configuration reference; a misspelt block would stop it.
LOKI_BLOCKS = {"auth_enabled", "server", "common", "schema_config", "limits_config", "compactor", "analytics"}


def check(*command: str) -> str:
    if not shutil.which(command[0]):
        pytest.skip(f"this machine has no {command[0]}")
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_its_configuration():
    assert "2 rule files found" in check("promtool", "check", "config", "--lint-fatal", "prometheus.yml")


def test_every_alert_fires_when_it_should():
    tested = yaml.safe_load((FOLDER / "rules" / "alerts_test.yml").read_text())["tests"]
    fired = {alert["alertname"] for test in tested for alert in test["alert_rule_test"] if alert["exp_alerts"]}
    alerts = {rule["alert"] for group in yaml.safe_load((FOLDER / "rules" / "alerts.yml").read_text())["groups"] for rule in group["rules"]}
    assert fired == alerts
    assert "SUCCESS" in check("promtool", "test", "rules", "rules/alerts_test.yml")


def test_alertmanager_takes_its_configuration_and_wakes_the_right_one():
    assert "SUCCESS" in check("amtool", "check-config", "alertmanager.yml")
    alerts = [rule for group in yaml.safe_load((FOLDER / "rules" / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
    for alert in alerts:
        severity = alert["labels"]["severity"]
        receiver = check("amtool", "config", "routes", "test", "--config.file=alertmanager.yml", f"severity={severity}").strip()
        assert receiver == ("on-call" if severity == "page" else "team")


def test_no_alert_is_sent_where_nobody_listens():
    receivers = yaml.safe_load((FOLDER / "alertmanager.yml").read_text())["receivers"]
    assert receivers == [{"name": "team"}, {"name": "on-call"}], "who is told, only the user knows"


def test_queries_ask_for_metrics_of_the_table_and_rules_that_are_there():
    known = {f"{metric.name}{suffix}" for metric in TABLE for suffix in (SUFFIXES if metric.kind == "histogram" else ("",))}
    rules = list(rule_expressions())
    queries = [*rules, *((place, query) for place, query, _ in board_queries())]
    for place, query in queries:
        assert set(NAME.findall(query)) <= known, place
        assert set(RULE.findall(query)) <= {name for name, _ in rules}, place
    asked = {name for _, query in queries for name in NAME.findall(query)}
    unasked = [metric.name for metric in TABLE if not any(name.startswith(metric.name) for name in asked)]
    assert unasked == [], "what no rule and no board asks for is not worth its cost"


@pytest.mark.parametrize(("file", "text"), list(files()), ids=lambda value: value.stem if isinstance(value, Path) else "")
def test_generated_files_are_as_the_generator_writes_them(file, text):
    assert file.read_text() == text, "python -m cluster.boards"


@pytest.mark.parametrize("name", BOARDS)
def test_grafanas_own_types_take_the_boards_whole(name):
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    board = json.loads((FOLDER / "boards" / f"{name.lower()}.json").read_text())
    taken = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(board)))
    assert_within(board, taken, name)


def assert_within(wanted, found, place: str) -> None:
    """Whether all that is wanted was kept; what Grafana does not know would be dropped."""
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            assert key in found, f"{place}.{key}"
            assert_within(value, found[key], f"{place}.{key}")
    elif isinstance(wanted, list):
        assert len(wanted) == len(found), place
        for number, (one, other) in enumerate(zip(wanted, found, strict=True)):
            assert_within(one, other, f"{place}[{number}]")
    else:
        assert wanted == found, place


def test_panels_lie_beside_each_other():
    for name in BOARDS:
        panels = json.loads((FOLDER / "boards" / f"{name.lower()}.json").read_text())["panels"]
        fields = [(panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y) for panel in panels for x in range(8) for y in range(8)]
        assert len(set(fields)) == len(fields), name
        assert max(x for x, _ in fields) < 24, "Grafana's grid is so wide"


def test_grafana_is_given_sources_and_boards_that_are_there():
    folder = FOLDER / "grafana" / "provisioning"
    sources = yaml.safe_load((folder / "datasources" / "tandem.yml").read_text())
    providers = yaml.safe_load((folder / "dashboards" / "tandem.yml").read_text())
    assert sources["apiVersion"] == providers["apiVersion"] == 1
    assert {source["uid"] for source in sources["datasources"]} == {"prometheus", "loki", "alertmanager"}
    assert {"name", "type", "access", "url"} <= set.intersection(*(set(source) for source in sources["datasources"]))
    assert [provider["options"]["path"] for provider in providers["providers"]] == ["$TANDEM_BOARDS", "$RAY_BOARDS"]
    used = {panel["datasource"]["uid"] for file in (FOLDER / "boards").glob("*.json") for panel in json.loads(file.read_text())["panels"]}
    assert used == {"prometheus"}


def test_loki_has_the_blocks_of_its_reference_and_keeps_logs_for_a_time():
    text = re.sub(r"\$\{\w+:([^}]*)\}", r"\1", (FOLDER / "loki.yml").read_text())
    config = yaml.safe_load(text)
    assert set(config) == LOKI_BLOCKS
    assert config["server"]["http_listen_address"] == config["server"]["grpc_listen_address"] == "127.0.0.1"
    (schema,) = config["schema_config"]["configs"]
    assert (schema["store"], schema["schema"], schema["index"]["period"]) == ("tsdb", "v13", "24h"), "what Loki 3 asks for"
    assert config["compactor"]["retention_enabled"] is True
    assert config["compactor"]["delete_request_store"] == schema["object_store"], "without it Loki 3 does not start"
    assert config["limits_config"]["retention_period"].endswith("h")


def test_alloy_reads_the_four_streams_and_its_parts_lead_to_each_other():
    text = re.sub(r"//.*(?=\n)", "", (FOLDER / "config.alloy").read_text().replace("http://", ""))
    assert text.count("{") == text.count("}")
    assert text.count("[") == text.count("]")
    assert 'external_labels = {"host" = constants.hostname}' in text, "or machines could not be told from each other"
    parts = {f"{kind}.{label}" for kind, label in COMPONENT.findall(text)}
    assert set(REFERENCE.findall(text)) <= parts
    assert {part.rpartition(".")[0] for part in parts} == {"local.file_match", "loki.source.file", "loki.process", "loki.write"}
    read = re.findall(r'"/([\w.]+)", "stream" = "(\w+)"', text)
    assert read == [(stream_file(FOLDER, stream).name, stream) for stream in STREAMS]
