"""Ray Train's controller in the driver's own process.

As an actor, which is Ray's way, it would first import in a process of its own all that the driver has imported: much of the time from
a job's start to its first step. Here it lives as long as the driver, as the actor would. Knows Ray Train's insides; does not know what is
trained.
"""

import asyncio
import logging
import time
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2._internal.logging import LoggingManager

from cluster.placement import given_cards
from train.standby import Standby

HEAR_EVERY_S = 1  # whole seconds, as Ray takes them
STANDBY_WITHIN_S = 60.0  # it may still import
NOT_OURS = (
    DatasetsCallback,  # a process that would hand Ray's own data sets to workers: ours read their rows
    PlacementGroupCleanerCallback,  # another for workers that outlive their controller: Ray ends those of a driver that is gone
)


class HearingHandle(DefaultPlacementGroupHandle):  # type: ignore[misc]
    """Cards that are waited for by a process that hears meanwhile: a signal is not answered within one wait of Ray's, which is a minute."""

    def wait(self, timeout_seconds: float = 30) -> bool:
        """Wait for the cards, and return whether they are there."""
        until_s = time.monotonic() + timeout_seconds
        while (began_s := time.monotonic()) < until_s:
            if super().wait(HEAR_EVERY_S):
                return True
            time.sleep(max(0.0, HEAR_EVERY_S - time.monotonic() + began_s))  # Ray's wait says no at once where it failed
        return False


class Workers(WorkerGroup):  # type: ignore[misc]
    """Workers that are not told of an actor of the controller's: they would ask it for checkpoints of their own run."""

    standby: Standby | None = None
    """Of this process's job, which is the only one."""

    def _create_workers(self, num_workers: int, placement_group: Any, resources_per_worker: dict[str, float], **more: Any) -> list[Any]:
        """Take the worker that stands by where the card is, else start them; the group of resources holds the card for it all the same."""
        if num_workers == 1 and self.standby and (actor := self.standby.take(given_cards())):
            try:
                found = ray.get(actor.get_metadata.remote(), timeout=STANDBY_WITHIN_S)
                workers: list[Any] = self._assign_worker_ranks([Worker(actor, found, resources_per_worker, placement_group_bundle_index=0)])
                return workers
            except RayError:  # whatever became of it, its job never needed it
                ray.kill(actor)
        started: list[Any] = super()._create_workers(num_workers, placement_group, resources_per_worker, **more)
        return started

    def _create_placement_group(self, *asked: Any) -> Any:
        return HearingHandle(super()._create_placement_group(*asked).placement_group)

    def _init_train_context_on_workers(self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]) -> None:
        told = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[number] for name, values in train_context_args.items()},
            )
            for number, worker in enumerate(workers)
        ]
        ray.get(told)
        self._decorate_worker_log_file_paths(workers)


class Controller(TrainController):  # type: ignore[misc]
    """A controller with workers of ours."""

    worker_group_cls = Workers


class Trainer(TorchTrainer):  # type: ignore[misc]
    """A trainer that runs its controller here; SIGINT stays as it is."""

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        _log_to_files(self.train_run_context)
        controller = Controller(**parts)
        asyncio.run(controller.run())
        return controller.get_result()

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, NOT_OURS)]


def _log_to_files(context: Any) -> None:
    """Write what the controller says where Ray's does, but not to the user's console."""
    LoggingManager.configure_controller_logger(context)
    logger = logging.getLogger("ray.train")
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, logging.StreamHandler)]
