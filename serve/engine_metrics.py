"""The engine's own part of what is measured: of vLLM's metrics the few in our table, through Ray to Prometheus.

Knows vLLM's hook for statistics. Imported by `serve.engine` alone. vLLM has some fifty metrics, one of them observed at each token, and
Ray's agents take a histogram's values one by one: what no board of ours shows is not sent.
"""

from typing import Any

from vllm.v1.metrics.ray_wrappers import (
    RayCounterWrapper,
    RayGaugeWrapper,
    RayHistogramWrapper,
    RayPrometheusMetric,
    RayPrometheusStatLogger,
)

from cluster.metrics import PREFIX, TABLE, VLLM

SHOWN = {metric.name.removeprefix(PREFIX).removesuffix("_total"): metric for metric in TABLE if metric.shown_by == VLLM}


class _Shown(RayPrometheusMetric):  # type: ignore[misc]
    """Whether a metric is one of the table; the others take their values, and keep nothing."""

    def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
        found = SHOWN.get(name.replace(":", "_"))
        self.is_shown = found is not None
        if found and found.buckets:
            kwargs["buckets"] = list(found.buckets)  # vLLM's are too wide for what waits milliseconds
        super().__init__(name, *args, **kwargs)


class ShownCounter(_Shown, RayCounterWrapper):  # type: ignore[misc]
    """A counter."""

    def inc(self, value: float = 1.0) -> None:
        """Count."""
        if self.is_shown:
            super().inc(value)


class ShownGauge(_Shown, RayGaugeWrapper):  # type: ignore[misc]
    """A gauge."""

    def set(self, value: float) -> None:
        """Tell what is now."""
        if self.is_shown:
            super().set(value)


class ShownHistogram(_Shown, RayHistogramWrapper):  # type: ignore[misc]
    """A histogram."""

    def observe(self, value: float) -> None:
        """Take one value."""
        if self.is_shown:
            super().observe(value)


class EngineStats(RayPrometheusStatLogger):  # type: ignore[misc]
    """vLLM's statistics; its parts for speculative decoding and the like, which Tandem does not use, are vLLM's own."""

    _counter_cls, _gauge_cls, _histogram_cls = ShownCounter, ShownGauge, ShownHistogram
