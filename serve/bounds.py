"""What one request may ask of the engine: where vLLM's own bounds are wide enough to keep everyone else waiting.

Knows the fields of a request. Does not know the engine.
"""

from typing import Any

from configs.schema import ServeConfig
from serve.grammar import check_grammars
from serve.protocols import Protocol
from serve.refusal import RefusedError

MAX_STOPS = 16
MAX_STOP_LETTERS = 256  # vLLM holds so much of a stream back as it looks for a stop string
MAX_LOGPROBS = 20  # as many as OpenAI gives, and as vLLM computes
MAX_LISTED = 1024  # entries of a list that the engine goes through for each token
LISTS = ("logit_bias", "bad_words", "allowed_token_ids")

TOOLS = ("function", "custom")  # what the client itself calls, in OpenAI's word and in Anthropic's

_INNER = "it steers the engine's inside"
_STORED = "no answer is stored; send the whole conversation"
CLOSED = {
    "background": _STORED,
    "conversation": _STORED,
    "previous_input_messages": _STORED,
    "previous_response_id": _STORED,
    "chat_template": "the model's own template is used: a template is a program",
    "ec_transfer_params": _INNER,
    "extra_args": _INNER,
    "kv_transfer_params": _INNER,
    "logits_processors": _INNER,
    "media_io_kwargs": _INNER,
    "mm_processor_kwargs": _INNER,
    "priority": "all requests are equal",
    "prompt_embeds": "prompts are text or tokens",
    "repetition_detection": "it is looked for after each token, at any length",
    "structured_outputs": "a grammar may take for ever to compile; response_format takes a JSON schema",
    "thinking_token_budget": _INNER,
    "use_beam_search": "each of its beams is a request that passes no queue",
    "vllm_xargs": _INNER,
}
"""Fields that vLLM would take and a client must not have, with the reason; those of later versions show in a test of vLLM's classes."""
MEDIA = ("image", "audio", "video", "file", "document", "input_image", "input_audio", "input_file")
"""What the type of a content part begins with, or one of its fields, where it is to be fetched, opened or decoded."""


def check_bounds(request: dict[str, Any], protocol: Protocol, config: ServeConfig) -> int:
    """Refuse a request that asks for too much; return the number of answers that the engine is to compute for it.

    Raises:
        RefusedError: 400, with the field's name.
    """
    _check_closed(request)
    _check_turns(request, protocol)
    _check_tools(request, config)
    check_grammars(request)
    if not isinstance(request.get("stream"), bool | None):  # vLLM would take "yes" for true
        raise RefusedError(400, "stream must be true or false", param="stream")
    for field in ("top_logprobs", "prompt_logprobs", "logprobs"):
        if field != "logprobs" or not isinstance(request.get(field), bool):  # a switch for chats, a number for completions
            _require_within(request, field, 0, MAX_LOGPROBS, "the engine computes no more")
    _check_stops(request)
    for field in LISTS:
        if isinstance(listed := request.get(field), dict | list) and len(listed) > MAX_LISTED:
            raise RefusedError(400, f"{field} has {len(listed)} entries; {MAX_LISTED} at most", param=field)
    return _num_answers(request, config)


def _num_answers(request: dict[str, Any], config: ServeConfig) -> int:
    most, why = config.max_choices, f"serve.max_choices={config.max_choices}"
    for field in ("n", "best_of"):
        _require_within(request, field, 1, most, why)
    num_prompts = _num_prompts(request.get("prompt"))
    num_answers: int = num_prompts * max(request.get(field) or 1 for field in ("n", "best_of"))
    if num_answers > most:
        raise RefusedError(400, f"{num_prompts} prompts ask for {num_answers} answers; {most} at most ({why})", param="prompt")
    return num_answers


def _check_closed(request: dict[str, Any]) -> None:
    for field, why in CLOSED.items():
        if request.get(field):
            raise RefusedError(400, f"{field} is not taken here: {why}", param=field)


def _check_turns(request: dict[str, Any], protocol: Protocol) -> None:
    for part in protocol.parts(request):
        kind = part.get("type")
        if (isinstance(kind, str) and kind.startswith(MEDIA)) or any(field.startswith(MEDIA) for field in part):
            reason = "nothing is fetched, opened or decoded for a request"
            raise RefusedError(400, f"messages may have text alone: {reason}", param=protocol.turns)
    if not (kinds := protocol.kinds_of_turns):
        return
    for turn in protocol.turns_of(request):
        kind = turn.get("type", "message") if isinstance(turn, dict) else None
        if kind not in kinds or (kind == "message" and not (isinstance(turn.get("role"), str) and _has_content(turn))):
            raise RefusedError(400, f"each turn is a {', '.join(kinds)}; a message has a role and a content", param=protocol.turns)


def _has_content(turn: dict[str, Any]) -> bool:
    """Return whether a turn says something, be it an empty text; vLLM stumbles over an empty list."""
    return isinstance(content := turn.get("content"), str) or bool(content)


def _check_tools(request: dict[str, Any], config: ServeConfig) -> None:
    tools, choice = request.get("tools"), request.get("tool_choice")
    if not tools or choice == "none" or (isinstance(choice, dict) and choice.get("type") == "none"):
        return
    if config.tool_parser == "none":
        raise RefusedError(400, "this model calls no tools (serve.tool_parser=none)", param="tools")
    for tool in tools if isinstance(tools, list) else []:
        if isinstance(tool, dict) and tool.get("type", "function") not in TOOLS:
            raise RefusedError(400, f"a tool may be a function of the client's own, not a {str(tool['type'])[:40]}", param="tools")


def _check_stops(request: dict[str, Any]) -> None:
    for field in ("stop", "stop_sequences", "stop_token_ids"):
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


def _require_within(request: dict[str, Any], field: str, least: int, most: int, why: str) -> None:
    value = request.get(field)
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise RefusedError(400, f"{field} must be a whole number", param=field)
    if not least <= value <= most:
        raise RefusedError(400, f"{field} may be {least} to {most} ({why})", param=field)
