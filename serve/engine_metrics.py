"""The engine's own part of what is measured: of vLLM's metrics the few in our table, through Ray to Prometheus.

Knows vLLM's hook for statistics. Imported by `serve.engine` alone. vLLM has some fifty metrics, of which it tells dozens at each of the
engine's steps and one for each token, in the loop that answers people: what no board of ours shows is not even looked at.
"""

import time
from typing import Any

from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.ray_wrappers import RayCounterWrapper, RayGaugeWrapper, RayHistogramWrapper

from cluster.metrics import PREFIX, TABLE, VLLM

LABELS = ["model_name", "engine"]
TELL_AGAIN_S = 10.0  # Ray forgets a gauge that was not told for a minute


class EngineStats(PrometheusStatLogger):  # type: ignore[misc]
    """In the place of vLLM's own, as whose kind vLLM knows it; of that it uses nothing."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        kinds = {"counter": RayCounterWrapper, "gauge": RayGaugeWrapper, "histogram": RayHistogramWrapper}
        labels = str(vllm_config.model_config.served_model_name), "0"  # each replica has one engine
        self.metrics: dict[str, Any] = {}
        for metric in TABLE:
            if metric.shown_by == VLLM:
                name = metric.name.removeprefix(PREFIX).removesuffix("_total")
                buckets = {"buckets": list(metric.buckets)} if metric.buckets else {}
                self.metrics[name.removeprefix("vllm_")] = kinds[metric.kind](name, metric.help, LABELS, **buckets).labels(*labels)
        self._told: tuple[int, int, float] | None = None
        self._told_s = 0.0

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """Take what one step of the engine says; a gauge that has not changed is told only so that it is not forgotten."""
        if scheduler_stats is not None:
            waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            now, now_s = (scheduler_stats.num_running_reqs, waiting, scheduler_stats.kv_cache_usage), time.monotonic()
            if now != self._told or now_s - self._told_s > TELL_AGAIN_S:
                self._told, self._told_s = now, now_s
                for name, value in zip(("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"), now, strict=True):
                    self.metrics[name].set(value)
            self.metrics["prefix_cache_queries"].inc(scheduler_stats.prefix_cache_stats.queries)
            self.metrics["prefix_cache_hits"].inc(scheduler_stats.prefix_cache_stats.hits)
        for ended in iteration_stats.finished_requests if iteration_stats else ():
            self.metrics["request_queue_time_seconds"].observe(ended.queued_time)

    def record_sleep_state(self, *_: Any, **__: Any) -> None:
        """Do nothing: the arbiter tells in its log, and among the handovers, that an engine goes to sleep."""

    def log_engine_initialized(self) -> None:
        """Do nothing: vLLM's settings are no metrics."""
