"""A micro-step, forth and back, as one CUDA graph: its kernels are asked for once, and replayed by one call from then on.

A step of a small model, or of one in 4 bit that is recomputed, is thousands of short kernels, and a host that names them one by one takes
longer than the GPU. A graph holds for one shape of batch, and reads and writes where it did when it was captured: inputs are copied there,
and gradients stay where they are. Knows tensors and how long they took. Does not know the model, or transformers.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from train.unpacked import Scratch

Inputs = dict[str, Any]
Run = Callable[[Inputs, torch.Tensor], torch.Tensor]
"""Takes a batch and the number of answer tokens of its whole step, adds to the gradients, and returns the loss."""

NUM_EAGER = 2  # kernels are compiled and chosen in the first ones, and the third is timed
HOST_BOUND = 0.7  # of a micro-step's time: where the host took so much of it to ask, the GPU waited for it
MAX_GRAPHS = 16  # each takes memory beside torch's allocator; what comes beyond runs as it is


@dataclass
class Captured:
    """A graph, and where it reads and writes."""

    graph: Any
    inputs: dict[str, torch.Tensor]
    num_items: torch.Tensor
    loss: torch.Tensor

    def replay(self, inputs: Inputs, num_items: torch.Tensor) -> torch.Tensor:
        """Do it all again with other inputs of the same shapes."""
        for name, place in self.inputs.items():
            place.copy_(inputs[name], non_blocking=True)
        self.num_items.copy_(num_items, non_blocking=True)
        self.graph.replay()
        return self.loss.clone()


class MicroSteps:
    """Runs micro-steps, those of a shape that comes again as a graph.

    Args:
        run: Does one.
        weights: What is trained.
        scratches: Of the model, whose contents a graph changes unseen.
        wanted: `auto` looks first whether the GPU waits for the host.
    """

    def __init__(self, run: Run, weights: Sequence[torch.Tensor], scratches: Sequence[Scratch], wanted: Literal["auto"] | bool) -> None:
        self.run, self.weights, self.scratches, self.wanted = run, weights, scratches, wanted
        self.is_on = False
        """Whether graphs are used: then gradients stay where they are."""
        self.num_steps = 0
        self.seen: set[tuple[Any, ...]] = set()
        """Shapes that came."""
        self.captured: dict[tuple[Any, ...], Captured] = {}
        self.pool: Any = None

    @property
    def may_be(self) -> bool:
        """Whether graphs are used, or may still be."""
        return self.is_on or (self.wanted is not False and self.num_steps <= NUM_EAGER)

    def step(self, inputs: Inputs, num_items: torch.Tensor) -> torch.Tensor:
        """Add a micro-step's gradients to the weights', and return its loss."""
        self.num_steps += 1
        shape = tuple((name, tuple(value.shape), value.dtype) for name, value in inputs.items())
        came_before, captured = shape in self.seen, self.captured.get(shape)
        self.seen.add(shape)
        if not self.is_on:
            return self._run_and_look(inputs, num_items)
        if captured is None and came_before and len(self.captured) < MAX_GRAPHS:
            captured = self._capture(shape, inputs, num_items)
        if captured is None:
            return self.run(inputs, num_items)
        loss = captured.replay(inputs, num_items)
        self._forget()
        return loss

    def zero_gradients(self) -> None:
        """Begin a step: gradients to which graphs add stay where they are."""
        if self.is_on:
            torch._foreach_zero_([weight.grad for weight in self.weights])
        else:
            for weight in self.weights:
                weight.grad = None

    def drop(self) -> None:
        """Give back the graphs' memory, for who needs as much of it once; they are captured anew when their shapes come again."""
        self.captured.clear()
        self.pool = None
        if self.is_on:
            torch.cuda.empty_cache()

    def _run_and_look(self, inputs: Inputs, num_items: torch.Tensor) -> torch.Tensor:
        """Run as it is; the last time before graphs may be used, look how long the host takes to ask, and the GPU to do it."""
        if self.wanted is False or self.num_steps != NUM_EAGER + 1:
            return self.run(inputs, num_items)
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        loss = self.run(inputs, num_items)
        asked_s = time.perf_counter() - began_s
        torch.cuda.synchronize()
        took_s = time.perf_counter() - began_s
        self.is_on = self.wanted is True or asked_s > HOST_BOUND * took_s
        if self.is_on:
            for weight in self.weights:  # one that got none must have a place too
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return loss

    def _forget(self) -> None:
        for scratch in self.scratches:
            scratch.forget()

    def _capture(self, shape: tuple[Any, ...], inputs: Inputs, num_items: torch.Tensor) -> Captured | None:
        """Have the host ask once for all of it, without it being done; None where that cannot be, and then never again."""
        own = {name: value.clone() for name, value in inputs.items()}
        count = num_items.clone()
        graph = torch.cuda.CUDAGraph()
        self._forget()
        try:
            # The thread that pins batches goes on meanwhile, and must not be taken for a part of it.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                loss = self.run(own, count)
        except RuntimeError as error:
            logging.getLogger(__name__).warning("steps are not replayed as CUDA graphs: %s", str(error).partition("\n")[0])
            self.wanted, self.is_on = False, False
            self.captured.clear()
            return None
        self.pool = self.pool or graph.pool()
        self.captured[shape] = Captured(graph, own, count, loss)
        return self.captured[shape]
