"""One frozen base on one card, and a group of adapters that learn beside it, each as if it were alone.

Adapters come and go at any time. Knows PEFT and the base's forward pass. Does not know threads, or what the adapters are tried for.
"""

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from cluster.home import new_folder
from configs.errors import ModelError
from configs.schema import ChatbotConfig
from train.attention import lay_end_to_end, take
from train.learner import Learner, num_targets
from train.loss import sum_losses
from train.memory import MAX_BATCH_TOKENS
from train.mixed import Batch, Mixer, Stack, make_batch
from train.model import draws_numbers, has_logit_settings, insert_adapter, packs_safely
from train.rows import Row

ADAPTER_FILE = "adapter_model.safetensors"
ROWS_MIX = "its layers would let rows of one batch see each other"


def why_apart(config: ChatbotConfig, base: ChatbotConfig | None = None) -> str | None:
    """Tell why this chatbot's adapter cannot share a base, or not that of another config, if it cannot."""
    if config.train.lora.dropout:
        return "train.lora.dropout draws random numbers in an order that depends on who else is there"
    if config.train.optimizer_bits != 32:
        return "train.optimizer_bits=8 has scales for parts of a matrix, which lies beside those of other adapters"
    if config.train.compile:
        return "train.compile compiles a base with one adapter"
    if config.train.num_workers > 1:
        return "train.num_workers wants several cards for one adapter"
    for name in ("model", "data", "train.quantization", "train.double_quantization", "train.precision"):
        if base and attrgetter(name)(config) != attrgetter(name)(base):
            return f"{name} differs from the base's"
    return None


@dataclass
class Member:
    """An adapter that shares the base."""

    slot: int
    name: str
    """What PEFT calls it."""
    learner: Learner
    parts: list[tuple[Stack, int, int]] = field(default_factory=list)
    """Its rows in each stack, in the model's order: first and after the last."""


class Group:
    """A base and its adapters; one thread at a time."""

    def __init__(
        self, base: Any, rows: list[Row], heldout: list[Row], gradient_checkpointing: bool = False, max_batch_tokens: int = MAX_BATCH_TOKENS
    ) -> None:
        """Take a base as `train.model.load_base` gives it for packed rows.

        Args:
            base: The frozen model, on its device.
            rows: What all adapters learn from, each in its own order.
            heldout: What they are measured on.
            gradient_checkpointing: Recompute activations to save memory.
            max_batch_tokens: Most tokens on their way through the base at once; each adapter's micro-batches are cut there.

        Raises:
            ModelError: The model's layers would let rows see each other, or draw random numbers.
        """
        if reason := why_no_group(base) or (None if lay_end_to_end(base) else ROWS_MIX):
            raise ModelError("this model cannot be shared by several adapters", reason, "train them one after another")
        if gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        self.base, self.rows, self.heldout = base, rows, heldout
        self.max_batch_tokens = max_batch_tokens
        self.device: torch.device = base.get_input_embeddings().weight.device
        self.members: dict[str, Member] = {}
        self.mixer = Mixer()
        self.model: Any = None  # PEFT's, from the first adapter on
        self.num_joined = 0

    def join(self, trial_id: str, config: ChatbotConfig, checkpoint: Path | None = None) -> None:
        """Add an adapter, fresh or from a checkpoint; one of the same trial, whose process died, makes room for it."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file
        from transformers import set_seed

        if reason := why_apart(config):
            raise ModelError("this adapter cannot share a base", reason, "train it alone")
        if trial_id in self.members:
            self.leave(trial_id)
        slot, name = self.num_joined, f"adapter{self.num_joined}"
        self.num_joined += 1
        learner = Learner(config, self.rows, self.heldout, self._is_bf16)
        set_seed(config.train.seed)  # as alone: the first numbers drawn are the adapter's
        self.model = insert_adapter(self.base, config.train.lora, self.model, name)
        self.members[trial_id] = Member(slot, name, learner)
        try:
            if checkpoint:
                set_peft_model_state_dict(self.model, load_file(checkpoint / ADAPTER_FILE), adapter_name=name)
            layers = [layer for layer in self.model.modules() if name in getattr(layer, "lora_A", ())]
            learner.begin(matrix for layer in layers for matrix in (layer.lora_A[name].weight.data, layer.lora_B[name].weight.data.T))
            self._stack()
            if checkpoint:
                learner.restore(checkpoint)
        except BaseException:
            self.leave(trial_id)  # the others go on as before
            raise

    def leave(self, trial_id: str) -> None:
        """Take an adapter away, and free its memory."""
        member = self.members.pop(trial_id)
        self.model.delete_adapter(member.name)
        self._stack()

    def _stack(self) -> None:
        """Lay each layer's matrices together; PEFT's layers and the optimizers see their own part of them."""
        self.mixer.stacks.clear()
        for member in self.members.values():
            member.parts.clear()
        for layer in self.model.modules():
            inside = [member for member in self.members.values() if member.name in getattr(layer, "lora_A", ())]
            if not inside:
                continue
            downs = [layer.lora_A[member.name].weight.data for member in inside]
            ups = [layer.lora_B[member.name].weight.data.T for member in inside]
            layout = tuple((member.slot, layer.r[member.name], layer.scaling[member.name]) for member in inside)
            stack = Stack(torch.cat(downs).requires_grad_(), torch.cat(ups).requires_grad_(), layout)
            self.mixer.take_over(layer)
            self.mixer.stacks[id(layer)] = stack
            end = 0
            for member, (_, rank, _) in zip(inside, layout, strict=True):
                begin, end = end, end + rank
                down, up = stack.down.detach()[begin:end], stack.up.detach()[begin:end]
                layer.lora_A[member.name].weight.data, layer.lora_B[member.name].weight.data = down, up.T
                place = 2 * len(member.parts)
                member.learner.parameters[place].data, member.learner.parameters[place + 1].data = down, up
                member.parts.append((stack, begin, end))

    def step(self, trial_ids: Sequence[str]) -> dict[str, float | RuntimeError]:
        """Take one step of each of these adapters, all through the base together; return their losses.

        An adapter whose own part of it fails has the error instead, and is spoilt. What is raised has changed none of them.
        """
        if not trial_ids:
            return {}
        members = {trial_id: self.members[trial_id] for trial_id in trial_ids}
        try:
            losses = self._learn(members.values())
            errors = {}
            for trial_id, member in members.items():
                try:
                    member.learner.update(self._gradients(member))
                except RuntimeError as error:  # such as no memory for its optimizer
                    errors[trial_id] = error
        finally:
            for stack in self.mixer.stacks.values():
                stack.down.grad = stack.up.grad = None
        found = dict(zip(members, losses.tolist(), strict=True))
        for trial_id in members.keys() - errors.keys():
            members[trial_id].learner.record(found[trial_id])
        return {**found, **errors}

    def _learn(self, members: Collection[Member]) -> torch.Tensor:
        """Compute the gradients of one step of each of these; return their losses."""
        weights = {member.slot: 1 / max(1, num_targets(member.learner.next_rows())) for member in members}
        smoothing = {member.slot: member.learner.config.train.label_smoothing for member in members}
        losses = {slot: torch.zeros((), device=self.device) for slot in weights}
        self._set_training(True)
        for batch in self._batches(members):
            sums = self._sums(batch, smoothing)
            torch.stack([total * weights[slot] for slot, total in sums.items()]).sum().backward()
            for slot, total in sums.items():
                losses[slot] += total.detach() * weights[slot]
        return torch.stack(list(losses.values()))

    def _gradients(self, member: Member) -> Iterator[torch.Tensor]:
        """Yield an adapter's part of the stacks' gradients, in the order of its matrices."""
        for stack, begin, end in member.parts:
            assert stack.down.grad is not None
            assert stack.up.grad is not None
            yield stack.down.grad[begin:end]
            yield stack.up.grad[begin:end]

    def _batches(self, members: Collection[Member]) -> Iterator[Batch]:
        """Lay one micro-batch of each beside those of the others: so many adapters take so many times the memory of one, and no more."""
        micro_batches = [[[(member.slot, row) for row in rows] for rows in member.learner.next_micro_batches()] for member in members]
        for together in zip_longest(*micro_batches, fillvalue=[]):
            yield from self._cut([row for rows in together for row in rows])

    def _cut(self, rows: list[tuple[int, Row]]) -> Iterator[Batch]:
        """Cut the rows where a batch would get too long."""
        begin, num_tokens = 0, 0
        for place, (_, row) in enumerate(rows):
            num_tokens += len(row["input_ids"])
            if num_tokens > self.max_batch_tokens and place > begin:
                yield make_batch(rows[begin:place], self.device)
                begin, num_tokens = place, len(row["input_ids"])
        yield make_batch(rows[begin:], self.device)

    def _sums(self, batch: Batch, smoothing: dict[int, float]) -> dict[int, torch.Tensor]:
        """Return each adapter's loss, summed over the batch's tokens."""
        self.mixer.batch = batch
        with self._autocast():
            decoder = self.base.get_decoder()
            hidden = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, rows=batch.rows, use_cache=False).last_hidden_state
            chosen = take(hidden[0], batch.sources)
            parts = zip(batch.slots, chosen.split(batch.num_targets), batch.targets.split(batch.num_targets), strict=True)
            head = self.base.get_output_embeddings()
            return {slot: sum_losses(states, head, targets, smoothing.get(slot, 0.0)) for slot, states, targets in parts}

    def evaluate(self, trial_id: str) -> float:
        """Return an adapter's held-out loss, as a Trainer measures it."""
        member = self.members[trial_id]
        self._set_training(False)
        total = torch.zeros((), device=self.device)
        with torch.no_grad():
            for rows in member.learner.heldout_batches():
                batch = make_batch([(member.slot, row) for row in rows], self.device)
                total += self._sums(batch, {})[member.slot] / batch.num_targets[0] * len(rows)
        loss = float(total / len(self.heldout))
        member.learner.log(eval_loss=loss)
        return loss

    def save(self, trial_id: str, folder: Path) -> None:
        """Write adapter, optimizer and position as a Trainer does, so that training alone can go on from it; the folder is new or empty."""
        member = self.members[trial_id]
        assert not folder.exists() or not any(folder.iterdir()), f"{folder} is not empty"
        self.model.active_adapter = member.name  # the one that PEFT means may have left
        with new_folder(folder) as draft:
            self.model.save_pretrained(draft, selected_adapters=[member.name])
            for file in (draft / member.name).iterdir():
                shutil.move(file, draft / file.name)
            (draft / member.name).rmdir()
            member.learner.save(draft)

    def _set_training(self, training: bool) -> None:
        if self.base.training != training:
            self.base.train(training)

    @property
    def _is_bf16(self) -> bool:
        return bool(self.base.dtype == torch.bfloat16)

    def _autocast(self) -> AbstractContextManager[Any]:
        autocast: AbstractContextManager[Any] = torch.autocast(self.device.type, torch.bfloat16, enabled=self._is_bf16)
        return autocast


def why_no_group(base: Any) -> str | None:
    """Tell why a base, with its weights or without, cannot be shared, if it cannot."""
    if not packs_safely(base):
        return ROWS_MIX
    if has_logit_settings(base):
        return "it changes its logits after the head"
    if draws_numbers(base):
        return "the base itself draws random numbers"
    return None
