"""The Serve deployment: one replica is one engine on one serve card, with the front before it.

Knows Ray Serve. Does not know how it is put into the cluster: see `serve.deploy`.
"""

import asyncio
import os
from typing import Any

from ray import serve as ray_serve

from cluster.models import ensure_model, model_fingerprint
from cluster.registry import Registry
from configs.schema import ChatbotConfig, ScalingConfig, ServeConfig
from serve.adapters import Adapters, Base
from serve.engine import engine_arguments, engine_environment, start_engine
from serve.feedback import FeedbackDesk
from serve.front import Doors, Front
from serve.keys import KeyFile
from serve.quotas import ClusterQuotas
from serve.tools import check_tool_parser, choose_tool_parser

MAX_CONSTRUCTOR_RETRIES = 3
HEALTH_PERIOD_S = 5.0
METRICS_INTERVAL_S = 1.0  # how often a replica tells its requests in flight
LOOK_BACK_S = 5.0  # they are averaged over so long


class Engine:
    """One vLLM engine; returns vLLM's own OpenAI application behind our front."""

    def __init__(self, config: dict[str, Any], base_name: str, gpu_share: float | None) -> None:
        self.config = ChatbotConfig.model_validate(config)
        self.base_name, self.gpu_share = base_name, gpu_share
        self.engine: Any = None
        self.watcher: asyncio.Task[None] | None = None
        self.feedback = FeedbackDesk.of_home(self.config.serve.feedback)

    async def __serve_build_asgi_app__(self) -> Any:
        """Start the engine; Serve calls this once, after the constructor."""
        folder = await asyncio.to_thread(ensure_model, self.config.model)
        base = Base(self.base_name, await asyncio.to_thread(model_fingerprint, folder), self.config.serve.max_lora_rank)
        adapters = Adapters(Registry(os.environ["MLFLOW_TRACKING_URI"]), base)
        parser = await asyncio.to_thread(choose_tool_parser, folder, self.config.serve.tool_parser)
        await asyncio.to_thread(check_tool_parser, folder, parser)
        settings = self.config.serve.model_copy(update={"tool_parser": parser})
        arguments = engine_arguments(self.config.model, settings, folder, self.base_name, self.gpu_share)
        self.engine, app = await start_engine(arguments, adapters)
        await adapters.refresh()
        self.watcher = asyncio.create_task(adapters.watch())
        doors = Doors(KeyFile(host=settings.host), ClusterQuotas())
        return Front(app, adapters, doors, self.feedback, settings)

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
    """Build the Serve application; its arguments come as JSON from `serve.deploy`."""
    config = ChatbotConfig.model_validate(args["config"])
    gpu_share: float | None = args["gpu_share"]
    on_gpu = gpu_share is not None
    environment = engine_environment(config.serve, on_gpu, num_threads=os.cpu_count() or 1)
    deployment = ray_serve.deployment(
        ray_serve.ingress()(Engine),
        name="engine",
        **_num_replicas(config.serve, args["max_replicas"]),
        max_ongoing_requests=args["max_ongoing_requests"],
        max_queued_requests=args["max_ongoing_requests"],  # beyond the front's own bound; over it Serve answers 503
        max_constructor_retry_count=MAX_CONSTRUCTOR_RETRIES,
        health_check_period_s=HEALTH_PERIOD_S,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": 1 if on_gpu else 0,
            "resources": {"card": 1},
            "label_selector": {"pool": "serve"},
            "fallback_strategy": [{"label_selector": {"pool": "train"}}] if config.serve.scaling.use_train_cards else [],
            "runtime_env": {"env_vars": environment},
        },
    )
    # Engines are not told how many they are: so another number restarts none of them.
    alone = config.model_copy(update={"serve": config.serve.model_copy(update={"scaling": ScalingConfig()})})
    return deployment.bind(alone.model_dump(mode="json"), args["base_name"], gpu_share)


def _num_replicas(config: ServeConfig, max_replicas: int) -> dict[str, Any]:
    """Return Serve's words for how many engines there are: a number, or what to grow and shrink by."""
    scaling = config.scaling
    if scaling.min_replicas == max_replicas:
        return {"num_replicas": max_replicas}
    autoscaling = {
        "min_replicas": scaling.min_replicas,
        "initial_replicas": max(1, scaling.min_replicas),
        "max_replicas": max_replicas,
        "target_ongoing_requests": scaling.requests_per_replica or config.max_num_seqs,
        "upscale_delay_s": scaling.up_after_s,
        "downscale_delay_s": scaling.down_after_s,
        "metrics_interval_s": METRICS_INTERVAL_S,
        "look_back_period_s": LOOK_BACK_S,
    }
    return {"autoscaling_config": autoscaling}
