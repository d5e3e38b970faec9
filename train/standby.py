"""A worker's process that is there before its job's turn: it has imported what takes seconds, on a card that chat may lend.

Knows Ray Train's actor of a worker, and the cards' labels. Does not know which model or data it will train on. Until its turn it uses
neither the card nor its GPU's memory.
"""

from collections.abc import Collection, Mapping, Sequence
from importlib import import_module, util
from typing import Any

import ray
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

from cluster.placement import CARD, GPU_SHARE, num_threads, on_cards
from configs.schema import TrainConfig

SLOW_IMPORTS = ("mlflow.tracking", "transformers.models.llama.modeling_llama", "peft", "train.reporting", "train.step", "train.worker")
GPU_IMPORTS = ("triton", "liger_kernel.transformers")


class Standby:
    """A worker that stands by, for whoever takes it first."""

    def __init__(self, actor: Any, card: str) -> None:
        self.actor, self.card = actor, card

    def take(self, cards: Collection[str]) -> Any:
        """Return the actor for work on these cards, once; None where it stands on another, and then it ends."""
        actor, self.actor = self.actor, None
        if actor is not None and self.card not in cards:
            ray.kill(actor)
            return None
        return actor


def begin_standby(train: TrainConfig, labels: Mapping[str, str]) -> Standby:
    """Start a worker on the card with these labels."""
    on_gpu = "gpu-share" in labels
    worker = ray.remote(RayTrainWorker).options(
        num_cpus=0,
        num_gpus=GPU_SHARE if on_gpu else 0,
        label_selector=on_cards([labels[CARD]]),
        runtime_env={"env_vars": worker_environment(train, [labels])},
    )
    actor = worker.remote()
    actor.execute.remote(_import_slowly, on_gpu)
    return Standby(actor, labels[CARD])


def worker_environment(train: TrainConfig, cards: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return what a worker is to find as it imports torch, by the labels of the cards it may have; with a GPU it is nothing.

    Without one, its card's cores or else its share of all, and threads that sleep while they wait for each other: the engine's card may
    have the same cores. No compiler where it needs none: bitsandbytes, which PEFT imports, gets it ready for bases in 4 bit, and that takes
    a second.
    """
    if any("gpu-share" in card for card in cards):
        return {}
    threads = min(num_threads(card, train.num_workers) for card in cards or [{}])
    compiles = train.quantization != "none"
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "TORCHDYNAMO_DISABLE": str(int(not compiles))}


def _import_slowly(on_gpu: bool) -> None:
    """Import what a worker would at its turn."""
    for name in (*SLOW_IMPORTS, *(GPU_IMPORTS if on_gpu else ())):
        if util.find_spec(name.partition(".")[0]):
            import_module(name)
