"""What Tandem knows of vLLM's requests, description and parsers, held against vLLM itself."""

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from serve.alive import Alive
from serve.bounds import CLOSED
from serve.completion_ids import CompletionIds
from serve.observed import EngineTimes, Observed, Watch
from serve.openapi import describe
from serve.protocols import PROTOCOLS
from serve.tools import FAMILIES, check_tool_parser, choose_tool_parser
from tests.helpers.data import tokenizer_folder

OPEN = """
    add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template_kwargs continue_final_message documents
    echo enable_response_messages frequency_penalty ignore_eos include include_reasoning include_stop_str_in_output input instructions
    length_penalty logit_bias logprob_token_ids logprobs max_completion_tokens max_output_tokens max_tokens max_tool_calls messages metadata
    min_p min_tokens model n output_config parallel_tool_calls presence_penalty prompt prompt_cache_key prompt_logprobs reasoning
    reasoning_effort repetition_penalty request_id response_format return_assistant_tokens_mask return_prompt_text return_token_ids
    return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start seed service_tier session_id skip_special_tokens
    spaces_between_special_tokens stop stop_sequences stop_token_ids store stream stream_interval stream_options suffix system temperature
    text tool_choice tools top_k top_logprobs top_p truncate_prompt_tokens truncation truncation_side user
"""


@pytest.fixture(scope="module")
def app():
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from serve.engine import _entry_points

    build_app, _, make_arg_parser = _entry_points()
    return build_app(make_arg_parser(FlexibleArgumentParser()).parse_args([]), supported_tasks=("generate",))


def request_schema(described: dict, path: str) -> dict:
    schema = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return described["components"]["schemas"][schema["$ref"].rpartition("/")[2]]


def test_every_field_of_vllms_requests_was_judged(app):
    """A field that a later vLLM brings is neither open nor closed until somebody has looked at it."""
    whole = app.openapi()
    fields = {name for path in PROTOCOLS for name in request_schema(whole, path)["properties"]}
    assert fields <= set(OPEN.split()) | set(CLOSED)
    assert not set(OPEN.split()) & set(CLOSED)


def test_the_description_has_what_is_open_and_nothing_else(app):
    described = describe(Alive(app, lambda: False))  # as it stands behind the front
    assert set(described["paths"]) == {*PROTOCOLS, "/v1/models"}
    for path in PROTOCOLS:
        assert set(described["paths"][path]) == {"post"}
        assert not set(request_schema(described, path)["properties"]) & set(CLOSED)
    text = json.dumps(described)
    assert "load_lora" not in text
    named = {part.partition('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}
    assert named == set(described["components"]["schemas"])


def test_the_families_parsers_are_vllms():
    from vllm.tool_parsers import ToolParserManager

    assert {parser for parser, _ in FAMILIES.values()} <= set(ToolParserManager.list_registered())


def test_a_parser_that_is_not_there_or_does_not_suit_is_named():
    folder: Path = tokenizer_folder()
    check_tool_parser(folder, "none")
    check_tool_parser(folder, "hermes")
    with pytest.raises(ConfigError, match="vLLM has no such parser"):
        check_tool_parser(folder, "hermse")
    with pytest.raises(ConfigError, match="does not suit this model"):
        check_tool_parser(folder, "llama3_json")


def test_a_chosen_parser_that_does_not_suit_turns_tools_off_and_a_named_one_is_refused(tmp_path):
    shutil.copytree(tokenizer_folder(), tmp_path / "model")
    folder = tmp_path / "model"
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "chat_template.jinja").write_text("<|python_tag|>")
    assert choose_tool_parser(folder, "auto") == "none"
    assert choose_tool_parser(folder, "hermes") == "hermes"
    with pytest.raises(ConfigError, match="does not suit this model"):
        choose_tool_parser(folder, "llama3_json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="only an engine without a GPU has it")
def test_an_adapter_of_the_output_layer_changes_its_own_rows_alone():
    """vLLM's own way dies where it is asked for the logits of a prompt, of which there are more than sampled rows."""
    from serve.cpu_lora import GroupedLora

    torch.manual_seed(0)
    wrapper = GroupedLora(16, max_batches=4, device="cpu")
    wrapper._sampler_indices[:3] = torch.tensor([1, -1, 0])
    wrapper.indices_len[1] = 3
    a, b = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 32, 4)
    a[0] = 0  # the first adapter leaves the output layer alone
    rows = torch.randn(3, 8)
    sampled, prompt = torch.zeros(3, 32), torch.zeros(5, 32)
    wrapper.add_lora_logits(sampled, rows, a, b, 0.5)
    torch.testing.assert_close(sampled[0], 0.5 * (b[1, 0] @ (a[1, 0] @ rows[0])))
    assert not sampled[1:].any()
    wrapper.add_lora_logits(prompt, torch.randn(5, 8), a, b, 0.5)
    assert not prompt.any()


def test_the_engine_tells_of_each_request_that_ended_by_the_id_that_the_front_gave_it():
    """Through vLLM's own statistics; what ends there is not what the client sees."""
    from vllm.v1.engine import FinishReason
    from vllm.v1.metrics.loggers import PerEngineStatLoggerAdapter
    from vllm.v1.metrics.stats import IterationStats, RequestStateStats

    from serve.engine import _make_stat_logger

    watch, seen = Watch(), Observed("asked", "POST", "/v1/chat/completions")
    seen.completion_id = CompletionIds("secret").make("helpdesk:2", None, seen.request_id)
    watch.begin(seen.completion_id)
    ended = IterationStats()
    clock = RequestStateStats(num_generation_tokens=3, queued_ts=1.0, scheduled_ts=1.5, first_token_ts=1.75, last_token_ts=2.75)
    ended.update_from_finished_request(FinishReason.STOP, f"chatcmpl-{seen.completion_id}", 7, None, clock)
    loggers = PerEngineStatLoggerAdapter(None, [0], _make_stat_logger(watch))
    loggers.record(None, None)
    loggers.record(None, ended)
    watch.end(seen)
    assert seen.engine == EngineTimes(queue_s=0.5, prefill_s=0.25, decode_s=1.0, num_prompt_tokens=7, num_answer_tokens=3)


STARLETTES = ["ServerErrorMiddleware", "ExceptionMiddleware", "AsyncExitStackMiddleware"]


def layers_of(app) -> list[str]:
    """The applications within an application, from the outside."""
    layers, layer = [], app.middleware_stack or app.build_middleware_stack()
    while layer is not None:
        layers.append(type(layer).__name__)
        layer = getattr(layer, "app", None)
    return layers


def test_no_answer_passes_through_layers_of_vllms_own(app):
    from serve.engine import _leave_out_layers

    before = layers_of(app)
    assert {"PrometheusInstrumentatorMiddleware", "CORSMiddleware"} <= set(before)
    _leave_out_layers(app)
    assert [name for name in layers_of(app) if name.endswith("Middleware")] == STARLETTES


def test_of_the_engines_numbers_those_of_the_table_are_told_a_while_after_all_the_steps_that_they_sum(monkeypatch):
    from types import SimpleNamespace

    from vllm.v1.engine import FinishReason
    from vllm.v1.metrics import ray_wrappers
    from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager
    from vllm.v1.metrics.stats import IterationStats, PrefixCacheStats, RequestStateStats, SchedulerStats

    from serve import engine_metrics
    from serve.engine_metrics import EngineStats

    told: list[tuple[str, float]] = []

    def make(name, description="", tag_keys=None, **_):
        def tell(value, tags):
            assert tags == {"model_name": "base", "engine": "0", "ReplicaId": ""}
            told.append((name, value))

        return SimpleNamespace(_tag_keys=tag_keys, set=tell, inc=tell, observe=tell)

    monkeypatch.setattr(ray_wrappers, "ray_metrics", SimpleNamespace(Counter=make, Gauge=make, Histogram=make))
    config = SimpleNamespace(model_config=SimpleNamespace(served_model_name="base"))
    manager = StatLoggerManager(config, custom_stat_loggers=[EngineStats], enable_default_loggers=False)
    assert [type(logger) for logger in manager.stat_loggers] == [EngineStats], "vLLM adds none of its own"
    assert issubclass(EngineStats, PrometheusStatLogger)
    step = SchedulerStats(
        num_running_reqs=2, num_waiting_reqs=1, kv_cache_usage=0.5, prefix_cache_stats=PrefixCacheStats(queries=7, hits=3)
    )
    ended = IterationStats()
    ended.update_from_finished_request(FinishReason.STOP, "asked", 7, None, RequestStateStats(queued_ts=1.0, scheduled_ts=1.5))
    monkeypatch.setattr(engine_metrics, "TELL_EVERY_S", 0.0)

    async def steps() -> None:
        manager.record(replace(step, num_running_reqs=1), ended)
        manager.record(step, None)
        assert not told
        await asyncio.sleep(0.01)

    asyncio.run(steps())
    gauges = [("vllm_num_requests_running", 2), ("vllm_num_requests_waiting", 1), ("vllm_kv_cache_usage_perc", 0.5)]
    counted = [("vllm_prefix_cache_queries", 14), ("vllm_prefix_cache_hits", 6)]
    assert told == [*gauges, *counted, ("vllm_request_queue_time_seconds", 0.5)]
    told.clear()
    asyncio.run(steps())
    assert told == [*gauges, *counted, ("vllm_request_queue_time_seconds", 0.5)], "what was told is told once"
    for quiet in (manager.log, manager.log_engine_initialized, manager.record_sleep_state):
        quiet()


def test_vllm_looks_for_strange_fields_in_requests_and_no_more_in_the_pieces_of_a_stream(monkeypatch):
    from vllm.entrypoints.openai.chat_completion import protocol as chat
    from vllm.entrypoints.openai.completion import protocol as completion
    from vllm.entrypoints.serve.engine import protocol as shared

    from serve.engine import leave_out_looks

    looked_at: list[str] = []
    monkeypatch.setattr(shared.logger, "debug", lambda text, *_: looked_at.append(text))

    def pieces() -> list[str]:
        said = chat.ChatCompletionResponseStreamChoice(index=0, delta=chat.DeltaMessage(content="so", strange=1), strange=1)
        text = completion.CompletionResponseStreamChoice(index=0, text="so", strange=1)
        head = {"id": "1", "created": 1, "model": "base", "strange": 1}
        whole = (chat.ChatCompletionStreamResponse(choices=[said], **head), completion.CompletionStreamResponse(choices=[text], **head))
        return [piece.model_dump_json(exclude_unset=True) for piece in whole]

    leave_out_looks()
    written = pieces()
    assert not looked_at
    assert json.loads(written[0])["choices"][0]["delta"] == {"content": "so", "strange": 1}
    assert json.loads(written[1])["choices"] == [{"index": 0, "text": "so", "strange": 1}]
    chat.ChatCompletionRequest(messages=[{"role": "user", "content": "so"}], strange=1)
    assert looked_at


def test_a_request_that_vllms_engine_has_is_no_more_on_its_way(monkeypatch):
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector

    from serve.engine import _tell_intake
    from serve.intake import Intake

    async def add_request(*_, **__) -> RequestOutputCollector:
        outputs = RequestOutputCollector(RequestOutputKind.DELTA, "1")
        outputs.put(RequestOutput("1", None, [], None, [], finished=True))
        return outputs

    monkeypatch.setattr(AsyncLLM, "__del__", lambda engine: None)
    engine = AsyncLLM.__new__(AsyncLLM)
    engine.add_request = add_request
    _tell_intake(engine)
    intake, was_free = Intake(num_at_once=1), []

    async def ask() -> None:
        async with intake.turn():
            was_free.append(not intake._turns.locked())
            async for _ in engine.generate("so", SamplingParams(), "1"):
                was_free.append(not intake._turns.locked())

    asyncio.run(ask())
    assert was_free == [False, True]
