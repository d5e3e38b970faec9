"""What one request may ask of the engine: where vLLM's own bounds are wide enough to keep everyone else waiting.

Knows the fields of a request. Does not know the engine.
"""

from typing import Any

from configs.schema import ServeConfig
from serve.refusal import RefusedError

MAX_STOPS = 16
MAX_STOP_LETTERS = 256  # vLLM holds so much of a stream back as it looks for a stop string
MAX_LOGPROBS = 20  # as many as OpenAI gives, and as vLLM computes


def check_bounds(request: dict[str, Any], config: ServeConfig) -> int:
    """Refuse a request that asks for too much; return the number of answers that the engine is to compute for it.

    Raises:
        RefusedError: 400, with the field's name.
    """
    if not isinstance(request.get("stream"), bool | None):  # vLLM would take "yes" for true
        raise RefusedError(400, "stream must be true or false", param="stream")
    _require_at_most(request, "top_logprobs", MAX_LOGPROBS, "the engine computes no more")
    if not isinstance(request.get("logprobs"), bool):  # a switch for chats, a number for completions
        _require_at_most(request, "logprobs", MAX_LOGPROBS, "the engine computes no more")
    _check_stops(request)
    most, why = config.max_choices, f"serve.max_choices={config.max_choices}"
    for field in ("n", "best_of"):
        _require_at_most(request, field, most, why)
    num_prompts = max(_num_prompts(request.get(field)) for field in ("prompt", "prompt_embeds"))
    num_answers: int = num_prompts * max(1, *(request.get(field) or 1 for field in ("n", "best_of")))
    if num_answers > most:
        raise RefusedError(400, f"{num_prompts} prompts ask for {num_answers} answers; {most} at most ({why})", param="prompt")
    return num_answers


def _check_stops(request: dict[str, Any]) -> None:
    for field in ("stop", "stop_token_ids"):
        value = request.get(field)
        stops = value if isinstance(value, list) else [value]
        if len(stops) > MAX_STOPS:
            raise RefusedError(400, f"{field} has {len(stops)} entries; at most {MAX_STOPS} are looked for", param=field)
        if any(isinstance(stop, str) and len(stop) > MAX_STOP_LETTERS for stop in stops):
            raise RefusedError(400, f"{field} has an entry of more than {MAX_STOP_LETTERS} letters", param=field)


def _num_prompts(prompt: Any) -> int:
    """Count the prompts of a completion: one text or list of tokens, or a list of those."""
    is_several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return len(prompt) if is_several else 1


def _require_at_most(request: dict[str, Any], field: str, most: int, why: str) -> None:
    value = request.get(field)
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise RefusedError(400, f"{field} must be a whole number", param=field)
    if value > most:
        raise RefusedError(400, f"{field} may be {most} at most ({why})", param=field)
