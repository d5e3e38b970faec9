"""The Serve deployment: one replica is one engine on one serve card, with the front before it.

Knows Ray Serve. Does not know how it is put into the cluster: see `serve.deploy`.
"""

import asyncio
import gc
import logging
import os
from collections.abc import Coroutine
from contextlib import nullcontext
from typing import Any

from ray import serve as ray_serve

from cluster.activity import ActivityFile
from cluster.logs import set_up, streams
from cluster.models import ensure_model, model_fingerprint
from cluster.placement import CARD, GPU_SHARE, HEAD, SEAT
from cluster.registry import Registry
from cluster.session import operator_key, read_session
from configs.schema import ModelConfig, ServeConfig
from serve.activity import Noted
from serve.adapters import Adapters, Base
from serve.alive import Alive, leave_with
from serve.counted import count_request
from serve.deploy import DEPLOYMENT
from serve.desk import HeadKeys, feedback_of_head, find_desk, watch_keys
from serve.engine import SLEEP_ARGUMENTS, engine_arguments, engine_environment, start_engine, take_threads
from serve.feedback import FeedbackDesk
from serve.front import LAST_WORDS, Doors, Front
from serve.keys import KeyFile
from serve.last_words import guard_connections
from serve.observed import Watch
from serve.quotas import ClusterQuotas
from serve.refusal import as_http, engine_lost
from serve.request_log import request_log
from serve.sleep import RayCardHold, Sleeper
from serve.tools import choose_tool_parser

MAX_CONSTRUCTOR_RETRIES = 3
HEALTH_PERIOD_S = 5.0
TOLD_AFTER_S = 1.0  # of a request, in logs and metrics: longer than it takes to hand the engine as many as it computes at once
LAST_ANSWER_S = 300.0  # an engine that is to leave ends its answers, but not for ever
# After so many new objects Python looks for garbage among the youngest, after a hundred times as many among all that were not there at the
# start: requests under way, in the loop that streams them. Its own 700 are for programs whose objects are few.
NUM_NEW_OBJECTS = 10_000
NUM_ARRIVING = 200  # requests whose bodies are being read, or that the front, whose queue is bounded, is refusing


class Engine:
    """One vLLM engine; returns vLLM's own OpenAI application behind our front."""

    def __init__(self, model: dict[str, Any], serve: dict[str, Any], base_name: str, gpu_share: float | None, sleeps: bool) -> None:
        self.model, self.serve = ModelConfig.model_validate(model), ServeConfig.model_validate(serve)
        self.base_name, self.gpu_share = base_name, gpu_share
        set_up()
        take_threads()
        self.activity = ActivityFile()
        self.sleeper = Sleeper(RayCardHold(), self.activity) if sleeps else None
        self.engine: Any = None
        self.is_leaving = False
        self.watch = Watch([count_request, request_log(streams())], TOLD_AFTER_S)
        self.watchers: list[asyncio.Task[None]] = []
        session = read_session()
        self.desk: Any = find_desk() if session and session.head else None  # on a machine that joined, the head has keys and feedback
        self.feedback = None if self.desk else FeedbackDesk.of_home(self.serve.feedback)

    async def __serve_build_asgi_app__(self) -> Any:
        """Start the engine; Serve calls this once, after the constructor."""
        feedback = self.feedback = self.feedback or await feedback_of_head(self.serve.feedback, self.desk)
        folder = await asyncio.to_thread(ensure_model, self.model)
        base = Base(self.base_name, await asyncio.to_thread(model_fingerprint, folder), self.serve.max_lora_rank)
        adapters = Adapters(Registry(os.environ["MLFLOW_TRACKING_URI"]), base)
        parser = await asyncio.to_thread(choose_tool_parser, folder, self.serve.tool_parser)
        settings = self.serve.model_copy(update={"tool_parser": parser})
        arguments = engine_arguments(self.model, settings, folder, self.base_name, self.gpu_share)
        if self.sleeper:
            arguments += SLEEP_ARGUMENTS if self.gpu_share else []
            await self.sleeper.take_card()
        self.engine, app = await start_engine(arguments, adapters, self.watch)
        await adapters.refresh()
        self._watch(adapters.watch(), leave_with(self.engine_has_died, self.say_last))
        if self.sleeper:
            self.sleeper.engine = self.engine
            self._watch(self.sleeper.watch())
        # After the engine's processes: each would hold the guardian's line open too.
        other = as_http(engine_lost(), engine_lost().body())
        await asyncio.to_thread(guard_connections, self.is_asleep, LAST_WORDS, other)
        doors = Doors(self._keys(settings.host), ClusterQuotas(), self.engine_has_died, self.sleeper.awake if self.sleeper else nullcontext)
        front = Front(Alive(app, self.engine_has_died), adapters, doors, feedback, settings)
        front.watch = self.watch
        gc.set_threshold(NUM_NEW_OBJECTS)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it would make a line for each request, and then throw it away
        return Noted(front, self.activity)

    def engine_has_died(self) -> bool:
        """Whether there is no engine any more; one that is shut down says so too. It is asked at each request."""
        has_failed = self.sleeper is not None and self.sleeper.has_failed
        return (has_failed or bool(self.engine.errored)) and not self.is_leaving

    def is_asleep(self) -> bool:
        """Whether a request must wait for the engine to wake."""
        return self.sleeper is not None and self.sleeper.sleeps

    def _watch(self, *watchers: Coroutine[Any, Any, None]) -> None:
        self.watchers += [asyncio.create_task(watcher) for watcher in watchers]

    def _keys(self, host: str) -> KeyFile:
        if not self.desk:
            return KeyFile(host=host, operator_secret=operator_key())
        keys = HeadKeys(host)
        self._watch(watch_keys(self.desk, keys))
        return keys

    async def check_health(self) -> None:
        """Tell Serve to replace this replica if its engine has died."""
        if self.engine is not None:
            await self.engine.check_health()

    def __del__(self) -> None:
        """End the engine's own process, which holds the card's memory; write what is still to be kept."""
        self.is_leaving = True
        if self.engine is not None:
            self.engine.shutdown()
        self.say_last()

    def say_last(self) -> None:
        """Write what is still to be told and kept."""
        self.watch.later_s = 0.0
        self.watch.tell()
        if self.feedback is not None:
            self.feedback.store.close()


def build(args: dict[str, Any]) -> Any:
    """Build the Serve application; its arguments come as JSON from `serve.deploy`, which also says how many engines there are.

    Other arguments replace every engine, so they hold only what an engine is made of.
    """
    serve = ServeConfig.model_validate(args["serve"])
    gpu_share: float | None = args["gpu_share"]
    sleeps: bool = args.get("sleeps", False)  # what was deployed before there was sleep says nothing of it
    on_gpu, where = gpu_share is not None, {"machine": HEAD} if args.get("only_head") else {}
    num_requests = serve.max_num_seqs + serve.max_waiting_requests + NUM_ARRIVING
    # Streams of a replica are guarded without a word in between; see `serve.last_words`.
    environment = engine_environment(serve, on_gpu) | {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": ""}
    deployment = ray_serve.deployment(
        ray_serve.ingress()(Engine),
        name=DEPLOYMENT,
        max_ongoing_requests=num_requests,
        max_queued_requests=num_requests,  # beyond the front's own bound; over it Serve answers 503
        max_constructor_retry_count=MAX_CONSTRUCTOR_RETRIES,
        health_check_period_s=HEALTH_PERIOD_S,
        logging_config={"enable_access_log": False},  # the front has one
        graceful_shutdown_timeout_s=LAST_ANSWER_S,
        ray_actor_options={
            "num_cpus": 0,  # who has a card has its cores; of one that sleeps, another has the card
            "num_gpus": GPU_SHARE if on_gpu else 0,
            "resources": {SEAT if sleeps else CARD: 1},
            "label_selector": {"pool": "serve", **where},
            "fallback_strategy": [{"label_selector": {"pool": "train", **where}}] if args["use_train_cards"] else [],
            "runtime_env": {"env_vars": environment},
        },
    )
    return deployment.bind(args["model"], args["serve"], args["base_name"], gpu_share, sleeps)
