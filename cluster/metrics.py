"""Every metric of Tandem, each declared once: name, type, unit, labels, what it says, and who shows it.

What Ray's processes (engines, workers) measure goes by `ray.util.metrics` to their node's agent, which shows it to Prometheus; Ray puts
`ray_` before each name, and `prometheus.yml` takes it off ours. The arbiter is no process of Ray's: see `cluster.exporter` for what it
shows. Does not know who measures what.
"""

import sys
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

RAY, ARBITER, VLLM, NODE = "Ray's agents", "the arbiter", "vLLM", "Ray"
OURS = (RAY, ARBITER)
PREFIX = "ray_"
SUFFIXES = ("_bucket", "_count", "_sum")

# Ray's agents take each value for the middle of its bucket: sums of histograms are as good as their buckets are narrow.
FIRST_TOKEN_S = (
    0.0005,
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1.0,
    1.5,
    2.0,
    3.0,
    5.0,
    10.0,
    20.0,
    60.0,
)
TOKEN_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
LOAD_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, eq=False)  # each is itself: looked up by identity, which is quick
class Metric:
    """One row of the table. Labels are bounded: names of keys, versions and cards, and words of ours; never what a client sends."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    labels: tuple[str, ...]
    help: str
    shown_by: str = RAY
    buckets: tuple[float, ...] = ()

    def add(self, amount: float = 1, **labels: str) -> None:
        """Count, if this process belongs to the cluster; elsewhere nobody would hear of it."""
        if amount > 0 and is_in_cluster():
            _in_ray(self).inc(amount, tags=labels)

    def set(self, value: float, **labels: str) -> None:
        """Tell what is now; it is forgotten a minute after it was told last."""
        if is_in_cluster():
            _in_ray(self).set(value, tags=labels)

    def observe(self, value: float, **labels: str) -> None:
        """Take one value into the histogram."""
        if is_in_cluster():
            _in_ray(self).observe(value, tags=labels)


def is_in_cluster() -> bool:
    """Whether this process has connected to Ray, and so an agent that hears of its metrics."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@cache
def _in_ray(metric: Metric) -> Any:
    from ray.util import metrics

    if metric.kind == "histogram":
        return metrics.Histogram(metric.name, metric.help, list(metric.buckets), metric.labels)
    kinds = {"counter": metrics.Counter, "gauge": metrics.Gauge}
    return kinds[metric.kind](metric.name, metric.help, metric.labels)


REQUESTS = Metric(
    "tandem_requests_total", "counter", "requests", ("key", "route", "status"),
    "Requests that reached an engine, by name of the key (none where none was shown) and HTTP status; 499 is a client who left.",
)  # fmt: skip
TOKENS = Metric("tandem_tokens_total", "counter", "tokens", ("model", "kind"), "Tokens of prompts and answers, by version.")
FIRST_TOKEN = Metric(
    "tandem_first_token_seconds", "histogram", "seconds", ("model", "part"),
    "Time to a stream's first token: whole, as the client sees it; engine, from its queue on; framework, the rest.", buckets=FIRST_TOKEN_S,
)  # fmt: skip
PER_TOKEN = Metric(
    "tandem_per_token_seconds", "histogram", "seconds", ("model", "part"),
    "Time of each later token of a stream, its mean: whole, engine and framework.", buckets=TOKEN_S,
)  # fmt: skip
QUOTA_USED = Metric("tandem_quota_used_ratio", "gauge", "share", ("key", "quota"), "Used share of a key's requests or tokens a minute.")
ADAPTERS_LOADED = Metric("tandem_adapters_loaded", "gauge", "adapters", (), "Versions that an engine has fetched and checked.")
ADAPTER_LOAD = Metric("tandem_adapter_load_seconds", "histogram", "seconds", (), "Fetching and checking a version's files.", buckets=LOAD_S)
TRAIN_TOKENS = Metric("tandem_train_tokens_total", "counter", "tokens", ("chatbot",), "Tokens trained on; its rate is the speed.")
TRAIN_STEPS = Metric("tandem_train_steps_total", "counter", "steps", ("chatbot",), "Steps trained.")
STEPS_LOST = Metric(
    "tandem_train_steps_lost_total", "counter", "steps", ("chatbot",), "Steps that were trained again, since what they made was not saved."
)
TRAIN_LOSS = Metric("tandem_train_loss", "gauge", "nats a token", ("chatbot",), "Loss in training, at the last report.")
EVAL_LOSS = Metric("tandem_train_eval_loss", "gauge", "nats a token", ("chatbot",), "Held-out loss, at the last evaluation.")

LOOKED = Metric(
    "tandem_arbiter_looked_timestamp_seconds", "gauge", "seconds since 1970", (),
    "When the arbiter last saw the cluster, 0 before it did; what it saw is shown for a minute.", ARBITER,
)  # fmt: skip
ENGINES_WANTED = Metric(
    "tandem_engines_wanted", "gauge", "engines", (),
    "Engines that chat is to have now, by its bounds, its requests and what it lends; one where all of chat was lost.", ARBITER,
)  # fmt: skip
ENGINES_ANSWERING = Metric(
    "tandem_engines_answering", "gauge", "engines", (), "Engines that run, have their card, and are reached.", ARBITER
)
CARD_UP = Metric("tandem_card_up", "gauge", "0 or 1", ("card", "pool"), "Whether a card's raylet is alive.", ARBITER)
CARD_BUSY = Metric(
    "tandem_card_busy_seconds_total", "counter", "seconds", ("card", "pool", "holder"),
    "Time that a card was held by chat, train, sweep, or a run in no line (other).", ARBITER,
)  # fmt: skip
CARD_LENT = Metric(
    "tandem_card_lent_seconds_total", "counter", "seconds", ("card", "pool"), "Time that a card served the other pool's work.", ARBITER
)
HANDOVERS = Metric(
    "tandem_handovers_total", "counter", "handovers", ("card", "reason"), "Cards given, asked for and left, and chat's bounds.", ARBITER
)
JOBS = Metric("tandem_jobs", "gauge", "jobs", ("kind", "state"), "Jobs of the line, by kind and state.", ARBITER)
JOB_WAITS = Metric("tandem_job_waiting_seconds", "gauge", "seconds", (), "How long the job has waited that waits longest.", ARBITER)
JOB_LOSSES = Metric("tandem_job_losses_total", "counter", "losses", (), "Times that a job's process, card or machine was lost.", ARBITER)
GATE_DECISIONS = Metric(
    "tandem_gate_decisions_total",
    "counter",
    "decisions",
    ("chatbot", "decision"),
    "Versions that passed, failed, or were taken back.",
    ARBITER,
)
GATE_DECIDED = Metric(
    "tandem_gate_decided_timestamp_seconds", "gauge", "seconds since 1970", ("chatbot", "decision"), "When a gate last decided so.", ARBITER
)
DISK_FREE = Metric(
    "tandem_disk_free_bytes", "gauge", "bytes", ("folder",),
    "Free room on the head's disk that has home (TANDEM_HOME) or logs (LOG_DIR).", ARBITER,
)  # fmt: skip
DISK_SIZE = Metric("tandem_disk_size_bytes", "gauge", "bytes", ("folder",), "Size of that disk.", ARBITER)

ENGINE = ("model_name",)
NODE_LABELS = ("ip",)
TABLE = (
    REQUESTS, TOKENS, FIRST_TOKEN, PER_TOKEN, QUOTA_USED, ADAPTERS_LOADED, ADAPTER_LOAD,
    TRAIN_TOKENS, TRAIN_STEPS, STEPS_LOST, TRAIN_LOSS, EVAL_LOSS,
    LOOKED, ENGINES_WANTED, ENGINES_ANSWERING,
    CARD_UP, CARD_BUSY, CARD_LENT, HANDOVERS, JOBS, JOB_WAITS, JOB_LOSSES, GATE_DECISIONS, GATE_DECIDED, DISK_FREE, DISK_SIZE,
    Metric("ray_vllm_request_queue_time_seconds", "histogram", "seconds", ENGINE, "Waits for a place in a batch.", VLLM, FIRST_TOKEN_S),
    Metric("ray_vllm_num_requests_running", "gauge", "requests", ENGINE, "Requests that the engine computes.", VLLM),
    Metric("ray_vllm_num_requests_waiting", "gauge", "requests", ENGINE, "Requests that wait for the engine.", VLLM),
    Metric("ray_vllm_kv_cache_usage_perc", "gauge", "share", ENGINE, "Used share of the key-value cache.", VLLM),
    Metric("ray_vllm_prefix_cache_queries_total", "counter", "tokens", ENGINE, "Prompt tokens looked for in the cache.", VLLM),
    Metric("ray_vllm_prefix_cache_hits_total", "counter", "tokens", ENGINE, "Those of them that were found.", VLLM),
    Metric("ray_node_cpu_utilization", "gauge", "percent", NODE_LABELS, "Use of a host's cores.", NODE),
    Metric("ray_node_mem_used", "gauge", "bytes", NODE_LABELS, "A host's used memory.", NODE),
    Metric("ray_node_mem_total", "gauge", "bytes", NODE_LABELS, "A host's memory.", NODE),
    Metric("ray_node_disk_free", "gauge", "bytes", NODE_LABELS, "Free room on a host's disk.", NODE),
    Metric("ray_node_disk_utilization_percentage", "gauge", "percent", NODE_LABELS, "Used share of a host's disk.", NODE),
    Metric("ray_node_gpus_utilization", "gauge", "percent", (*NODE_LABELS, "GpuIndex"), "Use of a GPU; none without one.", NODE),
    Metric("ray_node_gram_used", "gauge", "MiB", (*NODE_LABELS, "GpuIndex"), "A GPU's used memory; none without one.", NODE),
    Metric("ray_node_gram_available", "gauge", "MiB", (*NODE_LABELS, "GpuIndex"), "A GPU's free memory; none without one.", NODE),
    Metric("ray_node_gpu_temperature_celsius", "gauge", "degrees", (*NODE_LABELS, "GpuIndex"), "Heat of a GPU; none without one.", NODE),
    Metric("ray_node_gpu_power_milliwatts", "gauge", "milliwatts", (*NODE_LABELS, "GpuIndex"), "Power of a GPU; none without one.", NODE),
)  # fmt: skip
