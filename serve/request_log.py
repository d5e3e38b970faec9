"""Requests in the log: one line in `api` for each, and one in `inference` for what an engine answered; both have the request's id.

Knows which fields a line has. Does not know files, or how requests are seen.
"""

from cluster.logs import API, INFERENCE, Streams
from serve.observed import Observed, Observer

MS_PER_S = 1000
QUIET = ("/health",)  # asked every few seconds by whoever watches


def request_log(streams: Streams) -> Observer:
    """Return what writes each request's lines."""
    api, inference = streams.logger(API), streams.logger(INFERENCE)
    with_prompts = streams.config.prompts

    def write(seen: Observed) -> None:
        tell = api.debug if seen.route in QUIET else api.info
        ended = f"{seen.ended.replace(tzinfo=None).isoformat()}Z"
        tell(
            "request",
            timestamp=ended,
            request_id=seen.request_id,
            key_name=seen.key_name,
            method=seen.method,
            route=seen.route,
            status=seen.status,
            duration_ms=_ms(seen.duration_s),
        )
        if seen.version is None:
            return
        num_tokens, engine = seen.num_answer_tokens, seen.engine
        inference.info(
            "answer",
            timestamp=ended,
            request_id=seen.request_id,
            completion_id=seen.completion_id,
            version=seen.version,
            is_whole=seen.is_whole,
            ttft_ms=_ms(seen.ttft_s),
            tpot_ms=_ms(seen.tpot_s),
            engine_ttft_ms=_ms(engine.ttft_s) if engine else None,
            engine_tpot_ms=_ms(engine.tpot_s) if engine else None,
            queue_ms=_ms(engine.queue_s) if engine else None,
            num_prompt_tokens=seen.num_prompt_tokens,
            num_answer_tokens=num_tokens,
            tokens_per_s=round(num_tokens / seen.duration_s, 1) if num_tokens else None,
            **({"prompt": seen.prompt} if with_prompts else {}),
        )

    return write


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * MS_PER_S, 3)
