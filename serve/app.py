"""The Serve deployment: one replica is one engine on one serve card, with the front before it.

Knows Ray Serve. Does not know how it is put into the cluster: see `serve.deploy`.
"""

import asyncio
import os
from typing import Any

from ray import serve as ray_serve

from cluster.models import ensure_model, model_fingerprint
from cluster.registry import Registry
from cluster.session import operator_key
from configs.schema import ModelConfig, ServeConfig
from serve.activity import Noted
from serve.adapters import Adapters, Base
from serve.alive import Alive, leave_with
from serve.deploy import DEPLOYMENT
from serve.engine import engine_arguments, engine_environment, start_engine
from serve.feedback import FeedbackDesk
from serve.front import Doors, Front
from serve.keys import KeyFile
from serve.quotas import ClusterQuotas
from serve.tools import choose_tool_parser

MAX_CONSTRUCTOR_RETRIES = 3
HEALTH_PERIOD_S = 5.0
LAST_ANSWER_S = 300.0  # an engine that is to leave ends its answers, but not for ever
NUM_ARRIVING = 200  # requests whose bodies are being read, or that the front, whose queue is bounded, is refusing


class Engine:
    """One vLLM engine; returns vLLM's own OpenAI application behind our front."""

    def __init__(self, model: dict[str, Any], serve: dict[str, Any], base_name: str, gpu_share: float | None) -> None:
        self.model, self.serve = ModelConfig.model_validate(model), ServeConfig.model_validate(serve)
        self.base_name, self.gpu_share = base_name, gpu_share
        self.engine: Any = None
        self.watchers: list[asyncio.Task[None]] = []
        self.feedback = FeedbackDesk.of_home(self.serve.feedback)

    async def __serve_build_asgi_app__(self) -> Any:
        """Start the engine; Serve calls this once, after the constructor."""
        folder = await asyncio.to_thread(ensure_model, self.model)
        base = Base(self.base_name, await asyncio.to_thread(model_fingerprint, folder), self.serve.max_lora_rank)
        adapters = Adapters(Registry(os.environ["MLFLOW_TRACKING_URI"]), base)
        parser = await asyncio.to_thread(choose_tool_parser, folder, self.serve.tool_parser)
        settings = self.serve.model_copy(update={"tool_parser": parser})
        arguments = engine_arguments(self.model, settings, folder, self.base_name, self.gpu_share)
        self.engine, app = await start_engine(arguments, adapters)
        await adapters.refresh()
        engine_has_died = lambda: bool(self.engine.errored)  # noqa: E731 (it is asked at each request)
        watchers = (adapters.watch(), leave_with(engine_has_died, self.feedback.store.close))
        self.watchers = [asyncio.create_task(watcher) for watcher in watchers]
        doors = Doors(KeyFile(host=settings.host, operator_secret=operator_key()), ClusterQuotas())
        return Noted(Alive(Front(app, adapters, doors, self.feedback, settings), engine_has_died))

    async def check_health(self) -> None:
        """Tell Serve to replace this replica if its engine has died."""
        if self.engine is not None:
            await self.engine.check_health()

    def __del__(self) -> None:
        """End the engine's own process, which holds the card's memory; write what is still to be kept."""
        if self.engine is not None:
            self.engine.shutdown()
        self.feedback.store.close()


def build(args: dict[str, Any]) -> Any:
    """Build the Serve application; its arguments come as JSON from `serve.deploy`, which also says how many engines there are.

    Other arguments replace every engine, so they hold only what an engine is made of.
    """
    serve = ServeConfig.model_validate(args["serve"])
    gpu_share: float | None = args["gpu_share"]
    on_gpu = gpu_share is not None
    num_requests = serve.max_num_seqs + serve.max_waiting_requests + NUM_ARRIVING
    deployment = ray_serve.deployment(
        ray_serve.ingress()(Engine),
        name=DEPLOYMENT,
        max_ongoing_requests=num_requests,
        max_queued_requests=num_requests,  # beyond the front's own bound; over it Serve answers 503
        max_constructor_retry_count=MAX_CONSTRUCTOR_RETRIES,
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=LAST_ANSWER_S,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": 1 if on_gpu else 0,
            "resources": {"card": 1},
            "label_selector": {"pool": "serve"},
            "fallback_strategy": [{"label_selector": {"pool": "train"}}] if args["use_train_cards"] else [],
            "runtime_env": {"env_vars": engine_environment(serve, on_gpu, num_threads=os.cpu_count() or 1)},
        },
    )
    return deployment.bind(args["model"], args["serve"], args["base_name"], gpu_share)
