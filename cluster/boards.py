"""`python -m cluster.boards`: writes Grafana's boards and METRICS.md, both from what is declared here and in `cluster.metrics`.

Knows PromQL and Grafana's JSON. Rates are taken over `$__rate_interval`, which Grafana makes long enough for agents that hear of
something twice a minute.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.metrics import PREFIX, RAY, TABLE, Metric

FOLDER = Path(__file__).parent / "deploy" / "monitoring"
RATE = "$__rate_interval"
WIDTH, HEIGHT, COLUMNS = 8, 8, 3
SOURCE = {"type": "prometheus", "uid": "prometheus"}


@dataclass(frozen=True)
class Panel:
    """Curves in one frame: a query each, by what its curves are called."""

    title: str
    unit: str
    queries: dict[str, str]
    needs_gpu: bool = False
    """Whether it stays empty on a machine without a GPU."""


def _rate(metric: str, by: str = "", where: str = "") -> str:
    """Return a sum of rates."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{where}}}[{RATE}]))".replace("{}", "")


def _quantile(share: float, metric: str, by: str = "", where: str = "") -> str:
    """Return a quantile of a histogram."""
    return f"histogram_quantile({share}, {_rate(f'{metric}_bucket', f'le, {by}' if by else 'le', where)})"


WHOLE = 'part="whole"'
API = 'route=~"/v1/.+"'
BOARDS: dict[str, tuple[Panel, ...]] = {
    "Chat": (
        Panel("Requests, by status", "reqps", {"{{status}}": _rate("tandem_requests_total", "status", API)}),
        Panel("Answer tokens, by version", "short", {"{{model}}": _rate("tandem_tokens_total", "model", 'kind="answer"')}),
        Panel(
            "First token",
            "s",
            {f"p{share:.0%}"[:-1]: _quantile(share, "tandem_first_token_seconds", where=WHOLE) for share in (0.5, 0.95, 0.99)},
        ),
        Panel("First token, whose part (p95)", "s", {"{{part}}": _quantile(0.95, "tandem_first_token_seconds", "part")}),
        Panel("Each later token, whose part (p50)", "s", {"{{part}}": _quantile(0.5, "tandem_per_token_seconds", "part")}),
        Panel("Share of slow first tokens", "percentunit", {"5 minutes": "tandem:first_token_slow:ratio_rate5m"}),
        Panel(
            "Requests in the engines",
            "short",
            {"computed": "sum(ray_vllm_num_requests_running) or vector(0)", "waiting": "sum(ray_vllm_num_requests_waiting) or vector(0)"},
        ),
        Panel("Engines", "short", {"wanted": "sum(tandem_engines_wanted)", "answering": "sum(tandem_engines_answering)"}),
        Panel("Wait for a place in a batch (p95)", "s", {"wait": _quantile(0.95, "ray_vllm_request_queue_time_seconds")}),
        Panel(
            "Refused and failed, by key", "reqps", {"{{key}} {{status}}": _rate("tandem_requests_total", "key, status", 'status=~"[45].."')}
        ),
        Panel("Used share of quotas", "percentunit", {"{{key}} {{quota}}": "max by (key, quota) (tandem_quota_used_ratio)"}),
    ),
    "Training": (
        Panel("Tokens a second", "short", {"{{chatbot}}": _rate("tandem_train_tokens_total", "chatbot")}),
        Panel("Loss", "short", {"{{chatbot}}": "max by (chatbot) (tandem_train_loss)"}),
        Panel("Held-out loss", "short", {"{{chatbot}}": "max by (chatbot) (tandem_train_eval_loss)"}),
        Panel("Steps a second", "short", {"{{chatbot}}": _rate("tandem_train_steps_total", "chatbot")}),
        Panel("Steps that were trained again", "short", {"{{chatbot}}": "sum by (chatbot) (tandem_train_steps_lost_total)"}),
        Panel("Jobs in line", "short", {"{{kind}} {{state}}": 'sum by (kind, state) (tandem_jobs{state=~"waiting|running|leaving"})'}),
        Panel("The longest wait in line", "s", {"wait": "max(tandem_job_waiting_seconds)"}),
        Panel("Jobs that lost a process, card or machine", "short", {"losses": "sum(tandem_job_losses_total)"}),
        Panel("Decisions of gates", "short", {"{{chatbot}} {{decision}}": "sum by (chatbot, decision) (tandem_gate_decisions_total)"}),
    ),
    "Cards": (
        Panel("Busy share, by holder", "percentunit", {"{{card}} {{holder}}": _rate("tandem_card_busy_seconds_total", "card, holder")}),
        Panel("Share of time lent", "percentunit", {"{{card}}": _rate("tandem_card_lent_seconds_total", "card")}),
        Panel("Handovers", "short", {"{{card}}: {{reason}}": "sum by (card, reason) (tandem_handovers_total)"}),
        Panel("Cards that are up", "short", {"{{card}} ({{pool}})": "max by (card, pool) (tandem_card_up)"}),
        Panel("Memory of hosts", "percentunit", {"{{ip}}": "max by (ip) (ray_node_mem_used / ray_node_mem_total)"}),
        Panel("Cores of hosts", "percent", {"{{ip}}": "max by (ip) (ray_node_cpu_utilization)"}),
        Panel(
            "Free room on disks",
            "bytes",
            {"{{ip}}": "min by (ip) (ray_node_disk_free)", "{{folder}}": "min by (folder) (tandem_disk_free_bytes)"},
        ),
        Panel("Use of GPUs", "percent", {"{{ip}} {{GpuIndex}}": "max by (ip, GpuIndex) (ray_node_gpus_utilization)"}, needs_gpu=True),
        Panel(
            "Memory of GPUs",
            "percentunit",
            {"{{ip}} {{GpuIndex}}": "max by (ip, GpuIndex) (ray_node_gram_used / (ray_node_gram_used + ray_node_gram_available))"},
            needs_gpu=True,
        ),
        Panel(
            "Heat of GPUs", "celsius", {"{{ip}} {{GpuIndex}}": "max by (ip, GpuIndex) (ray_node_gpu_temperature_celsius)"}, needs_gpu=True
        ),
        Panel(
            "Power of GPUs", "watt", {"{{ip}} {{GpuIndex}}": "max by (ip, GpuIndex) (ray_node_gpu_power_milliwatts) / 1000"}, needs_gpu=True
        ),
    ),
    "Adapters": (
        Panel("Versions loaded, by engine", "short", {"{{instance}}": "max by (instance) (tandem_adapters_loaded)"}),
        Panel("Fetching a version (p95)", "s", {"fetch": _quantile(0.95, "tandem_adapter_load_seconds")}),
        Panel("Versions fetched", "short", {"fetched": "sum(tandem_adapter_load_seconds_count)"}),
        Panel("Tokens, by version", "short", {"{{model}} {{kind}}": _rate("tandem_tokens_total", "model, kind")}),
        Panel("First token, by version (p50)", "s", {"{{model}}": _quantile(0.5, "tandem_first_token_seconds", "model", WHOLE)}),
        Panel("Key-value cache", "percentunit", {"{{model_name}}": "max by (model_name) (ray_vllm_kv_cache_usage_perc)"}),
        Panel(
            "Prompt tokens found in the cache",
            "percentunit",
            {"share": f"{_rate('ray_vllm_prefix_cache_hits_total')} / {_rate('ray_vllm_prefix_cache_queries_total')}"},
        ),
    ),
}


def board_json(name: str) -> dict[str, Any]:
    """Return one board as Grafana reads it."""
    return {
        "uid": f"tandem-{name.lower()}",
        "title": f"Tandem: {name}",
        "tags": ["tandem"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "panels": [_panel_json(place, panel) for place, panel in enumerate(BOARDS[name])],
    }


def _panel_json(place: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(place, COLUMNS)
    return {
        "id": place + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": SOURCE,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": column * WIDTH, "y": row * HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": SOURCE, "expr": query, "legendFormat": legend}
            for number, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def metrics_page() -> str:
    """Return METRICS.md."""
    rows = [
        f"| `{metric.name}` | {metric.kind} | {metric.unit} | {_labels(metric)} | {metric.shown_by} | {metric.help} |" for metric in TABLE
    ]
    return HEAD + "\n".join(rows) + "\n"


def _labels(metric: Metric) -> str:
    return ", ".join(metric.labels) or "none"


HEAD = f"""# Metrics

Written by `python -m cluster.boards` from `cluster/metrics.py`; a test holds it against what a running cluster shows.

What {RAY} show carries Ray's labels too (`WorkerId`, `NodeAddress`, `SessionName` and the like), of which boards and rules ask
nothing: they sum over processes. Ray writes `{PREFIX}` before each name; `prometheus.yml` takes it off ours. Processes report each half
minute, and once more as they end. Sums of histograms are made of the middles of their buckets. A gauge is forgotten a minute after its
process told it last.

Beside these there are Ray's own, some hundreds, of which Ray's boards are made.

| metric | type | unit | labels | shown by | what it says |
|---|---|---|---|---|---|
"""


def files() -> Iterator[tuple[Path, str]]:
    """Give each file's path and text."""
    yield FOLDER / "METRICS.md", metrics_page()
    for name in BOARDS:
        yield FOLDER / "boards" / f"{name.lower()}.json", json.dumps(board_json(name), indent=1) + "\n"


if __name__ == "__main__":
    for file, text in files():
        file.write_text(text, encoding="utf-8")
        print(file.relative_to(FOLDER))
