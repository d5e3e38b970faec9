"""How much a run computes at once, by the memory of its card: chosen, or refused, before Ray is asked for anything.

Knows the plan (`cluster.plan`) and prepared data. Does not know the step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.home import BYTES_PER_GIB
from cluster.memory import Rows, Step
from cluster.models import read_config_file, read_model_config
from cluster.placement import is_usable
from cluster.plan import ROUND_TOKENS, Place, choose, place_on, require_fit, settle
from cluster.plan_table import show_size
from cluster.rates import step_s
from cluster.shape import Shape, read_shape
from configs.errors import ModelError
from configs.schema import ChatbotConfig, TrainConfig

if TYPE_CHECKING:
    from data.prepare import Prepared  # for types alone: a worker reads rows that are prepared, and need not import how

S_PER_MINUTE = 60
ADAPTER_BYTES = 16  # a weight in fp32, its gradient and two moments
MAX_BATCH_TOKENS = 8192  # of several adapters on one base together, as `train.group.Group` cuts its batches


@dataclass(frozen=True)
class Sizing:
    """What a run's size is chosen by; plain values, so that Ray can send it to a sweep's trials."""

    shape: Shape
    rows: Rows
    place: Place

    def settle(self, config: ChatbotConfig) -> tuple[ChatbotConfig, Step]:
        """Return the config with what was chosen in the place of `auto`, and the step that it makes.

        Raises:
            ClusterError: Nothing fits the card.
        """
        choice = require_fit(self.shape, config, self.rows, self.place)
        return config.model_copy(update={"train": settle(config.train, choice)}), choice.step

    def settle_base(self, config: ChatbotConfig, num_adapters: int) -> ChatbotConfig:
        """Return the config with activations recomputed where so many adapters on one base would not fit otherwise."""
        if config.train.gradient_checkpointing != "auto":
            return config
        at_once = max(1, min(num_adapters * config.train.batch_size, MAX_BATCH_TOKENS // self.rows.longest_tokens))
        together = config.train.model_copy(update={"batch_size": at_once, "num_workers": 1, "micro_batch_size": at_once})
        others_gib = (num_adapters - 1) * self.shape.num_adapter_weights(config.train.lora) * ADAPTER_BYTES / BYTES_PER_GIB
        choice = choose(self.shape, together, self.rows, replace(self.place, limit_gib=max(0.1, self.place.usable_gib - others_gib)))
        recomputes = choice is None or choice.step.recomputes
        return config.model_copy(update={"train": config.train.model_copy(update={"gradient_checkpointing": recomputes})})

    def predict_gib(self, train: TrainConfig) -> float:
        """Return the memory that a run takes whose size is settled."""
        return Step(self.shape, train, self.rows, self.place.device).need().gib

    def describe(self, step: Step, data: "Prepared") -> str:
        """Tell what was chosen, and how long training takes where the card's rate is known."""
        words = f"plan: {show_size(step)}; about {step.need().gib:.1f} of the {self.place.memory_gib:.4g} GiB of {self.place.name}"
        if self.place.rate is None or not self.place.rate.is_of(step.train) or not self.place.device.on_gpu:
            return words
        mean = Rows(round(data.num_train_tokens / data.num_train), round(data.num_loss_tokens / data.num_train))
        num_micro_batches = step.train.batch_size // step.train.num_workers // step.size
        seconds = step.train.count_steps(data.num_train) * num_micro_batches * step_s(replace(step, rows=mean), self.place.rate)
        return f"{words}; {seconds / S_PER_MINUTE:.0f} min without pauses"


def make_sizing(config: ChatbotConfig, model: Mapping[str, Any], rows: Rows, cards: Sequence[dict[str, str]]) -> Sizing | None:
    """Return what runs are sized by; None where the plan does not know the model.

    Args:
        config: The chatbot.
        model: Its base model's config.json.
        rows: What is trained on.
        cards: Labels of a cluster's cards; of those that this process may train on the smallest counts.
    """
    try:
        shape = read_shape(model, config.model.name)
    except ModelError:
        return None
    smallest = min((card for card in cards if is_usable(card)), key=lambda card: float(card["memory-gib"]), default=None)
    if smallest is None:
        return None  # who asks for a card tells that there is none
    return Sizing(shape, rows, place_on(smallest, config))


def size_prepared(config: ChatbotConfig, model_folder: Path, data: "Prepared", cards: Sequence[dict[str, str]]) -> Sizing | None:
    """Return what runs on prepared conversations are sized by; None where the plan does not know the model."""
    model = read_config_file(model_folder)
    return make_sizing(config, model, Rows(data.longest_tokens, data.most_loss_tokens), cards)


def require_room(config: ChatbotConfig, cards: Sequence[dict[str, str]]) -> None:
    """Refuse what not even short rows would fit with, before its base is fetched.

    Raises:
        ClusterError: It does not fit its card.
        ModelError: The model's config.json cannot be had.
    """
    if sizing := make_sizing(config, read_model_config(config.model), Rows(ROUND_TOKENS, ROUND_TOKENS), cards):
        sizing.settle(config)
