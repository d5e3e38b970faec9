"""vLLM's engine and its own OpenAI application, for the versions of vLLM that Tandem runs with.

Knows vLLM's import paths and arguments; besides it, only `serve.tools`, `serve.cpu_lora`, `serve.gpu_lora` and `serve.engine_metrics`
import vLLM. Does not know Ray.
"""

import json
import os
from pathlib import Path
from typing import Any

from cluster.limits import num_cpus
from cluster.metrics import is_in_cluster
from configs.schema import ModelConfig, ServeConfig
from serve.adapters import Adapters
from serve.intake import reached
from serve.observed import EngineTimes, Watch
from serve.tools import OFF

OUTPUT_CHUNK = {"VLLM_V1_OUTPUT_PROC_CHUNK_SIZE": "16"}
"""Of a step's tokens so many are handed on before whoever came meanwhile has a turn; vLLM's 128 let a new request wait for all of them,
at each of the turns that it takes to reach the engine."""
CPU_WORKER, GPU_WORKER = "serve.cpu_lora.GroupedLoraWorker", "serve.gpu_lora.BesideLoraWorker"
BESIDE = {"VLLM_LORA_ENABLE_DUAL_STREAM": "1", "VLLM_LORA_DISABLE_PDL": "1"}
"""With the first vLLM leaves a linear layer and its adapters to one operation, in which `serve.gpu_lora` stands."""
GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512)
"""Tokens of a batch for which there are CUDA graphs, 16 where vLLM has 51: each takes a start some tenths of a second. Reading the
weights takes a step longest, so that a batch which is filled up to the next size takes hardly longer."""
# In the engine's own process, as on a GPU. For `uni` vLLM would start one more, to bind its threads to cores; ours are not bound.
CPU_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
SLEEP_ARGUMENTS = ["--enable-sleep-mode"]


def engine_environment(config: ServeConfig, on_gpu: bool) -> dict[str, str]:
    """Return the environment that an engine's process needs before vLLM is imported."""
    shared = OUTPUT_CHUNK | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # lets the resolver be asked; the routes of that name are closed in front
        "VLLM_ENABLE_RESPONSES_API_STORE": "0",  # it is one for all keys, and never forgets
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CONFIGURE_LOGGING": "0",  # it would close the handlers of the process that it is imported into: the replica's log
        "HF_HUB_OFFLINE": "1",  # the base is local by now
    }
    if on_gpu:
        return shared | BESIDE
    # Left alone, vLLM takes a large share of memory, and binds its threads to cores that others use too.
    return shared | {
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


def take_threads() -> None:
    """Let this process's engine have a thread for each core that it may use, by the environment; Ray says one, and vLLM is yet to come."""
    os.environ["OMP_NUM_THREADS"] = str(num_cpus())


def engine_arguments(model: ModelConfig, config: ServeConfig, folder: Path, base_name: str, gpu_share: float | None) -> list[str]:
    """Return vLLM's command line for a base model; `gpu_share` is the card's share of its GPU, None without one."""
    arguments = {
        "--model": str(folder),
        "--served-model-name": base_name,
        "--dtype": {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}[model.precision],
        "--max-model-len": str(config.max_model_len_tokens),
        "--max-num-seqs": str(config.max_num_seqs),
        "--max-lora-rank": str(config.max_lora_rank),
        "--max-loras": str(config.max_loras),
        "--max-cpu-loras": str(config.max_cpu_loras),
    }
    wanted = {"max_new_tokens": config.max_answer_tokens, "temperature": config.temperature}
    if set_here := {name: value for name, value in wanted.items() if value is not None}:
        arguments["--override-generation-config"] = json.dumps(set_here)
    flags = ["--enable-lora", "--disable-uvicorn-access-log"]
    if config.tool_parser not in ("auto", OFF):
        arguments["--tool-call-parser"] = config.tool_parser
        flags.append("--enable-auto-tool-choice")
    if gpu_share is not None:
        arguments["--gpu-memory-utilization"] = f"{config.gpu_memory_share * gpu_share:.3f}"
        arguments["--worker-cls"] = GPU_WORKER
        if config.quantization != "none":
            arguments["--quantization"] = config.quantization
        if not config.enforce_eager:
            flags += ["--cudagraph-capture-sizes", *map(str, graph_sizes(config.max_num_seqs))]
    else:
        arguments |= {"--worker-cls": CPU_WORKER, "--distributed-executor-backend": CPU_EXECUTOR}
    if gpu_share is None or config.enforce_eager:
        flags.append("--enforce-eager")
    return [*(word for pair in arguments.items() for word in pair), *flags]


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Return the tokens of a batch for which there are CUDA graphs: up to twice as many as there are answers at once, as vLLM has it."""
    most = min(2 * max_num_seqs, GRAPH_SIZES[-1])
    return sorted({size for size in GRAPH_SIZES if size <= most} | {most})


async def start_engine(arguments: list[str], adapters: Adapters, watch: Watch) -> tuple[Any, Any]:
    """Start the engine and build vLLM's application on it, with adapters found by name; return (engine, ASGI application).

    What the engine says of each request at its end goes to `watch`.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.envs import enable_envs_cache
    from vllm.lora.resolver import LoRAResolverRegistry
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    build_app, init_app_state, make_arg_parser = _entry_points()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    engine_config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    engine = AsyncLLM.from_vllm_config(engine_config, stat_loggers=_stat_loggers(watch))
    tasks = await engine.get_supported_tasks()
    # Before init_app_state, which asks once for the resolvers there are.
    LoRAResolverRegistry.register_resolver("tandem", _make_resolver(adapters))
    app = build_app(args, supported_tasks=tasks)
    await init_app_state(engine, app.state, args, supported_tasks=tasks)
    _leave_out_layers(app)
    leave_out_looks()
    _tell_intake(engine)
    enable_envs_cache()  # as the engine's own process does: at each token one is looked up
    return engine, app


def _tell_intake(engine: Any) -> None:
    """Have the engine tell when it has a request."""
    add_request = engine.add_request

    async def add_and_tell(*args: Any, **kwargs: Any) -> Any:
        outputs = await add_request(*args, **kwargs)
        reached()
        return outputs

    engine.add_request = add_and_tell


def _leave_out_layers(app: Any) -> None:
    """Take out what vLLM puts around its routes: each piece went through it, and the front does what is to be done there.

    It counts for a closed route, looks for a key, which the front keeps back, and lets the pages of all other sites read answers (CORS).
    """
    app.user_middleware = []
    app.middleware_stack = app.build_middleware_stack()  # vLLM's application comes with one


def leave_out_looks() -> None:
    """Have vLLM no longer look for fields that it does not know in each piece of a stream, which it writes itself."""
    from vllm.entrypoints.openai.chat_completion import protocol as chat
    from vllm.entrypoints.openai.completion import protocol as completion

    for kind in (
        chat.DeltaMessage,
        chat.ChatCompletionResponseStreamChoice,
        chat.ChatCompletionStreamResponse,
        completion.CompletionResponseStreamChoice,
        completion.CompletionStreamResponse,
    ):
        kind.__pydantic_decorators__.model_validators.pop("__log_extra_fields__", None)
        kind.model_rebuild(force=True)


def _stat_loggers(watch: Watch) -> list[Any]:
    if not is_in_cluster():
        return [_make_stat_logger(watch)]
    from serve.engine_metrics import EngineStats

    return [_make_stat_logger(watch), EngineStats]


def _entry_points() -> tuple[Any, Any, Any]:
    """Return build_app, init_app_state and make_arg_parser, which moved between vLLM 0.26 and 0.29."""
    try:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:
        from vllm.entrypoints.openai.api_server import build_app, init_app_state
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    return build_app, init_app_state, make_arg_parser


def _make_stat_logger(watch: Watch) -> Any:
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Teller(StatLoggerBase):  # type: ignore[misc]
        """Tells of each request that ended."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
            for ended in iteration_stats.finished_requests if iteration_stats else ():
                # An older vLLM does not say which request it was.
                if engine_id := getattr(ended, "request_id", None):
                    tokens = ended.num_prompt_tokens, ended.num_generation_tokens
                    watch.note(engine_id, EngineTimes(ended.queued_time, ended.prefill_time, ended.decode_time, *tokens))

        def log_engine_initialized(self) -> None:
            pass

    return Teller


def _make_resolver(adapters: Adapters) -> Any:
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class RegistryResolver(LoRAResolver):  # type: ignore[misc]
        """Finds an adapter that the front has already fetched and checked."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            folder = adapters.fetched(lora_name)
            # vLLM gives the request a number of its own afterwards.
            return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(folder)) if folder else None

    return RegistryResolver()
