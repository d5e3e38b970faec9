"""What is counted of each request that the front has seen to its end.

Knows the table of metrics and `Observed`. Does not know where they are shown.
"""

from cluster.metrics import FIRST_TOKEN, PER_TOKEN, REQUESTS, TOKENS, Metric
from serve.observed import Observed

NO_KEY = "none"


def count_request(seen: Observed) -> None:
    """Count a request, its tokens and its times; an `Observer`."""
    REQUESTS.add(key=seen.key_name or NO_KEY, route=seen.route, status=str(seen.status))
    if seen.version is None:
        return
    TOKENS.add(seen.num_prompt_tokens or 0, model=seen.version, kind="prompt")
    TOKENS.add(seen.num_answer_tokens or 0, model=seen.version, kind="answer")
    engine = seen.engine
    _observe(FIRST_TOKEN, seen.version, seen.ttft_s, engine.ttft_s if engine else None)
    _observe(PER_TOKEN, seen.version, seen.tpot_s, engine.tpot_s if engine else None)


def _observe(metric: Metric, version: str, whole_s: float | None, engine_s: float | None) -> None:
    """Take a time as the client sees it, and whose part of it is whose; the engine's clock may be a hair off."""
    if whole_s is None:
        return
    metric.observe(whole_s, model=version, part="whole")
    if engine_s is not None:
        metric.observe(engine_s, model=version, part="engine")
        metric.observe(max(0.0, whole_s - engine_s), model=version, part="framework")
