"""The engine's own part of what is measured: of vLLM's metrics the few in our table, through Ray to Prometheus.

Knows vLLM's hook for statistics. Imported by `serve.engine` alone. vLLM has some fifty metrics, of which it tells dozens at each of the
engine's steps and one for each token, in the loop that answers people: what no board of ours shows is not even looked at, and what one
shows is told once a second. Telling Ray lets go of Python's lock, and whoever takes it meanwhile makes the loop wait.
"""

import asyncio
from collections import deque
from typing import Any

from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.ray_wrappers import RayCounterWrapper, RayGaugeWrapper, RayHistogramWrapper

from cluster.metrics import PREFIX, TABLE, VLLM
from serve.observed import NUM_TOLD_AT_ONCE

LABELS = ["model_name", "engine"]
TELL_EVERY_S = 1.0


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
        self._now: dict[str, float] = {}
        self._counted = dict.fromkeys(("prefix_cache_queries", "prefix_cache_hits"), 0)
        self._queued_s: deque[float] = deque()
        self._is_to_tell = False

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """Take what one step of the engine says; it is told within a second."""
        if scheduler_stats is not None:
            waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self._now["num_requests_running"], self._now["num_requests_waiting"] = scheduler_stats.num_running_reqs, waiting
            self._now["kv_cache_usage_perc"] = scheduler_stats.kv_cache_usage
            self._counted["prefix_cache_queries"] += scheduler_stats.prefix_cache_stats.queries
            self._counted["prefix_cache_hits"] += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats:
            self._queued_s.extend(ended.queued_time for ended in iteration_stats.finished_requests)
        if not self._is_to_tell:
            self._is_to_tell = True
            asyncio.get_running_loop().call_later(TELL_EVERY_S, self._tell)

    def _tell(self) -> None:
        self._is_to_tell = False
        for name, value in self._now.items():
            self.metrics[name].set(value)
        for name, number in self._counted.items():
            self.metrics[name].inc(number)
            self._counted[name] = 0
        self._tell_queued()

    def _tell_queued(self) -> None:
        for _ in range(min(len(self._queued_s), NUM_TOLD_AT_ONCE)):
            self.metrics["request_queue_time_seconds"].observe(self._queued_s.popleft())
        if self._queued_s:
            asyncio.get_running_loop().call_soon(self._tell_queued)

    def record_sleep_state(self, *_: Any, **__: Any) -> None:
        """Do nothing: the arbiter tells in its log, and among the handovers, that an engine goes to sleep."""

    def log_engine_initialized(self) -> None:
        """Do nothing: vLLM's settings are no metrics."""
