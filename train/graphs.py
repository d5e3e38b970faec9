"""A micro-step, forth and back, as one CUDA graph: its kernels are asked for once, and replayed by one call from then on.

A step of a small model, or of one in 4 bit that is recomputed, is thousands of short kernels, and a host that names them one by one takes
longer than the GPU. A graph holds for one shape of batch, and reads and writes where it did when it was captured: inputs are copied there,
and gradients stay where they are. Knows tensors and how long they took. Does not know the model, or transformers.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch

from train.unpacked import Scratch

Inputs = dict[str, Any]
Shape = tuple[Any, ...]
Run = Callable[[Inputs, torch.Tensor], torch.Tensor]
"""Takes a batch and the number of answer tokens of its whole step, adds to the gradients, and returns the loss."""

NUM_EAGER = 2  # kernels are compiled and chosen in the first ones, and again in the first one of a shape
WORTH = 0.75  # of a step's time that one as a graph may take: for graphs, both times, rows and packed batches are filled up
MAX_GRAPHS = 16  # each takes memory beside torch's allocator; the one that was replayed least lately leaves
# A capture takes about as long as a step that is none. After so many it is looked whether graphs were replayed twice as often.
MANY_CAPTURES, REPLAYS_FOR_ONE = 4 * MAX_GRAPHS, 2


@dataclass
class Captured:
    """A graph, and where it reads and writes."""

    graph: Any
    inputs: Inputs
    num_items: torch.Tensor
    loss: torch.Tensor

    def replay(self, inputs: Inputs, num_items: torch.Tensor) -> torch.Tensor:
        """Do it all again with other inputs of the same shapes."""
        for name, place in self.inputs.items():
            if isinstance(place, torch.Tensor):
                place.copy_(inputs[name], non_blocking=True)
        self.num_items.copy_(num_items, non_blocking=True)
        self.graph.replay()
        return self.loss.clone()


def _leave_capture(stream: Any) -> None:
    """Undo what torch leaves behind where the end of a capture fails: its stream, and random numbers that wait for that end."""
    torch.cuda.set_stream(stream)
    numbers = torch.cuda.default_generators[torch.cuda.current_device()]
    with suppress(RuntimeError):  # training itself draws none on a GPU
        numbers.graphsafe_set_state(numbers.clone_state())  # whose copy begins without a capture


def _shape(value: Any) -> Any:
    """Return what of an input makes another graph: all of it, where it is no tensor."""
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value


class MicroSteps:
    """Runs micro-steps as graphs, one for each shape: all of them, for what runs as it is would need as much memory beside the graphs' own.

    Args:
        run: Does one.
        weights: What is trained.
        scratches: Of the model, whose contents a graph changes unseen.
        wanted: `auto` tries one, and goes on with them where it is quicker: where the GPU waited for the host.
    """

    def __init__(self, run: Run, weights: Sequence[torch.Tensor], scratches: Sequence[Scratch], wanted: Literal["auto"] | bool) -> None:
        self.run, self.weights, self.scratches, self.wanted = run, weights, scratches, wanted
        self.is_on = False
        """Whether graphs are used: then gradients stay where they are."""
        self.num_steps = self.num_captures = self.num_replays = 0
        self.took_s: dict[Shape, float | None] = {}
        """Of a step that is no graph, the second of its shape, while it is not known whether one is quicker."""
        self.captured: dict[Shape, Captured] = {}
        self.pool: Any = None

    @property
    def may_be(self) -> bool:
        """Whether graphs are used, or may still be."""
        return self.wanted is not False

    def step(self, inputs: Inputs, num_items: torch.Tensor) -> torch.Tensor:
        """Add a micro-step's gradients to the weights', and return its loss."""
        self.num_steps += 1
        shape = tuple((name, _shape(value)) for name, value in inputs.items())
        if self.num_steps <= NUM_EAGER or not self.wanted:
            return self.run(inputs, num_items)
        if self.wanted == "auto":
            return self._try(shape, inputs, num_items)
        captured = self.captured.pop(shape, None)
        if captured:
            self.captured[shape] = captured  # as the last
        elif self.num_captures >= MANY_CAPTURES and self.num_replays < REPLAYS_FOR_ONE * self.num_captures:
            self._give_up()
        else:
            captured = self._capture(shape, inputs, num_items)
        return self._replay(captured, inputs, num_items) if captured else self.run(inputs, num_items)

    def zero_gradients(self) -> None:
        """Begin a step: gradients to which graphs add stay where they are."""
        if self.is_on:
            torch._foreach_zero_([weight.grad for weight in self.weights])
        else:
            for weight in self.weights:
                weight.grad = None

    def drop(self) -> None:
        """Give back the graphs' memory, for who needs as much of it once; they are captured anew when their shapes come again."""
        if self.captured:
            torch.cuda.synchronize()  # or memory goes while it is used
        self.captured.clear()
        self.pool = None
        if self.is_on:
            torch.cuda.empty_cache()

    def _give_up(self) -> None:
        """Use graphs no more."""
        self._forget()
        self.drop()
        self.wanted = self.is_on = False

    def _try(self, shape: Shape, inputs: Inputs, num_items: torch.Tensor) -> torch.Tensor:
        """Take the time of a step as it is, and of the next one of its shape as a graph; then it is known which is to be used."""
        eager_s = self.took_s.get(shape)
        captured = self._capture(shape, inputs, num_items) if eager_s else None
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        loss = self._replay(captured, inputs, num_items) if captured else self.run(inputs, num_items)
        torch.cuda.synchronize()
        took_s = time.perf_counter() - began_s
        if captured and eager_s:
            captured = None  # or its memory would stay
            self.wanted = True
            if took_s >= WORTH * eager_s:
                self._give_up()
        elif self.wanted:
            self.took_s[shape] = took_s if shape in self.took_s else None
        return loss

    def _replay(self, captured: Captured, inputs: Inputs, num_items: torch.Tensor) -> torch.Tensor:
        self.num_replays += 1
        loss = captured.replay(inputs, num_items)
        self._forget()
        return loss

    def _forget(self) -> None:
        for scratch in self.scratches:
            scratch.forget()

    def _capture(self, shape: Shape, inputs: Inputs, num_items: torch.Tensor) -> Captured | None:
        """Have the host ask once for all of it, without it being done; None where that cannot be, and then never again."""
        self.is_on = True
        self.num_captures += 1
        if len(self.captured) == MAX_GRAPHS:
            torch.cuda.synchronize()
            del self.captured[next(iter(self.captured))]
        for weight in self.weights:  # a graph adds to what is there
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        self._forget()
        stream = torch.cuda.current_stream()
        try:
            own = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
            self.captured[shape] = self._captured(own, num_items.clone())
        except RuntimeError as error:
            _leave_capture(stream)
            cause = str(error.__context__ or error).partition("\n")[0]
            logging.getLogger(__name__).warning("steps are not replayed as CUDA graphs: %s", cause)
        if shape not in self.captured:
            self._give_up()
        return self.captured.get(shape)

    def _captured(self, inputs: Inputs, num_items: torch.Tensor) -> Captured:
        graph = torch.cuda.CUDAGraph()
        # Kernels of a new shape may be compiled and loaded meanwhile, and the thread that pins batches goes on.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="relaxed"):
            loss = self.run(inputs, num_items)
        self.pool = self.pool or graph.pool()
        return Captured(graph, inputs, num_items, loss)
