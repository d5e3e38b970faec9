"""What fits on a card, chosen before anything is queued: micro-batch and recomputing for training, and which card does which job.

Knows memory and speed as `cluster.memory` and `cluster.rates` reckon them. Does not start anything, and reads no weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from operator import attrgetter

from cluster.cards import MIN_FP8_CAPABILITY, cpu_has_bf16
from cluster.home import BYTES_PER_GIB
from cluster.memory import BF16_BYTES, FP32_BYTES, Device, Need, Rows, Step
from cluster.rates import UNKNOWN, Rate, find_rate, step_s
from cluster.shape import Shape
from configs.errors import ClusterError, ConfigError, FitError
from configs.schema import ChatbotConfig, TrainConfig

# Of a card's memory, left free: a prediction may be under by 3 %, and nvidia-smi counts some that no process gets.
MARGIN = 0.05
ROUND_TOKENS = 64
RANKS = (256, 128, 64, 32, 16, 8)


@dataclass(frozen=True)
class Place:
    """A card as the plan sees it."""

    name: str
    memory_gib: float
    device: Device
    rate: Rate | None = None
    limit_gib: float | None = None
    """What a training process may take, where somebody says so; on part of a GPU it may be more than that part."""
    whole_gib: float | None = None
    """Memory of the whole GPU, where the card is a part of one."""
    has_fp8: bool | None = None
    """Whether it trains in FP8; None where nobody knows. A CPU does not: see `require_precision`."""

    @property
    def usable_gib(self) -> float:
        """What a training process may take."""
        if self.limit_gib is None:
            return self.memory_gib * (1 - MARGIN)
        return min(self.limit_gib, (self.whole_gib or self.memory_gib) * (1 - MARGIN))

    @property
    def title(self) -> str:
        """Name and memory."""
        return f"{self.name}, {self.memory_gib:.4g} GiB"


@dataclass(frozen=True)
class Choice:
    """A way to train that fits a card."""

    step: Step
    need: Need
    step_s: float
    """Seconds of a whole batch, where the card's rate is known; else only good to compare."""


def place_on(labels: Mapping[str, str], config: ChatbotConfig) -> Place:
    """Return the place that a running card's labels describe, for a chatbot's precision and within its limit."""
    on_gpu, memory_gib = "gpu-share" in labels, float(labels["memory-gib"])
    has_bf16 = labels.get("bf16", "true") == "true" if on_gpu else cpu_has_bf16()
    device = Device(on_gpu, value_bytes(config.model.precision, has_bf16))
    rate = find_rate(labels["accelerator"]) if on_gpu else None
    whole_gib = memory_gib / float(labels["gpu-share"]) if on_gpu else None
    name, limit_gib = f"{labels['card']} ({labels['accelerator']})", config.train.max_memory_gib
    return Place(name, memory_gib, device, rate, limit_gib, whole_gib, _has_fp8(labels))


def _has_fp8(labels: Mapping[str, str]) -> bool:
    """Whether the card with these labels multiplies in FP8."""
    return labels.get("fp8") == "true"


def value_bytes(precision: str, has_bf16: bool) -> int:
    """Return the bytes of a weight that is not quantised."""
    return BF16_BYTES if precision == "bf16" or (precision == "auto" and has_bf16) else FP32_BYTES


def choose(shape: Shape, train: TrainConfig, rows: Rows, place: Place) -> Choice | None:
    """Return the quickest way to train that fits, within what the config has set by hand; None where nothing fits."""
    rate = place.rate or (UNKNOWN if place.device.on_gpu else Rate(1e10))
    fitting = [_weigh(step, rate) for step in _candidates(shape, train, rows, place.device)]
    fitting = [choice for choice in fitting if choice.need.gib <= place.usable_gib]
    # Where more at once is not quicker it is not slower either.
    return min(fitting, key=lambda choice: (round(choice.step_s, 6), -choice.step.size), default=None)


def smallest(shape: Shape, train: TrainConfig, rows: Rows, device: Device) -> Need:
    """Return the least memory that the config's settings can be trained in."""
    return min((step.need() for step in _candidates(shape, train, rows, device)), key=lambda need: need.total_bytes)


def with_base_in(train: TrainConfig, quantization: str) -> TrainConfig:
    """Return the settings with another format of the base; in 4 bit it cannot multiply in FP8 too."""
    return train.model_copy(update={"quantization": quantization, **({} if quantization == "none" else {"precision": "auto"})})


def suited(train: TrainConfig, place: Place) -> TrainConfig:
    """Return the settings as a card can train with them: without FP8 where it is known to have none."""
    return train.model_copy(update={"precision": "auto"}) if place.has_fp8 is False else train


def settle(train: TrainConfig, choice: Choice) -> TrainConfig:
    """Return the settings with what was chosen in the place of `auto`."""
    chosen = choice.step.train
    return train.model_copy(
        update={"micro_batch_size": chosen.micro_batch_size, "gradient_checkpointing": chosen.gradient_checkpointing},
    )


def _candidates(shape: Shape, train: TrainConfig, rows: Rows, device: Device) -> Iterator[Step]:
    share = train.batch_size // train.num_workers
    sizes = [size for size in range(1, share + 1) if share % size == 0] if train.micro_batch_size == "auto" else [train.micro_batch_size]
    recomputing = (False, True) if train.gradient_checkpointing == "auto" else (train.gradient_checkpointing,)
    for size, recomputes in product(sizes, recomputing):
        settled = train.model_copy(update={"micro_batch_size": size, "gradient_checkpointing": recomputes})
        yield Step(shape, settled, rows, device)


def _weigh(step: Step, rate: Rate) -> Choice:
    num_micro_batches = step.train.batch_size // step.train.num_workers // step.size
    return Choice(step, step.need(), num_micro_batches * step_s(step, rate))


def longest_row(shape: Shape, train: TrainConfig, place: Place) -> int:
    """Return the longest row, in tokens, that can be trained at all: one at once, recomputed; 0 where none can."""
    step = train.model_copy(update={"micro_batch_size": 1, "gradient_checkpointing": True})

    def fits(num_tokens: int) -> bool:
        return smallest(shape, step, Rows(num_tokens, num_tokens), place.device).gib <= place.usable_gib

    return _most(fits, shape.max_context_tokens)


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """Return the most tokens that fit, in steps of 64 and up to a limit; 0 where not even those do."""
    low, high = 0, max(1, limit // ROUND_TOKENS)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * ROUND_TOKENS) else (low, middle - 1)
    return low * ROUND_TOKENS


def require_precision(config: ChatbotConfig, cards: Iterable[Mapping[str, str]]) -> None:
    """Refuse FP8, for a run or any of a sweep's trials, where a card that may train them does not multiply in it.

    A CPU is refused too: it would compute the same numbers, at less than its pace in bf16, and FP8 is for nothing but speed.

    Args:
        config: The chatbot.
        cards: Labels of the cards that may train it.

    Raises:
        ClusterError: There is such a card.
    """
    varied = config.tune.space.get("train.precision")
    if "fp8" not in {config.train.precision, *((varied and varied.choice) or [])}:
        return
    for card in cards:
        if not _has_fp8(card):
            why = f"{card['card']} ({card['accelerator']}) is none: such have compute capability {MIN_FP8_CAPABILITY} or more"
            raise ClusterError("train.precision=fp8 wants GPUs that multiply in FP8", why, "train.precision=auto")


def require_fit(shape: Shape, config: ChatbotConfig, rows: Rows, place: Place) -> Choice:
    """Return the quickest way to train on a card, or refuse with the nearest settings that fit.

    Raises:
        FitError: Nothing fits.
        ConfigError: Nothing fits within the limit that the config sets, on whatever card.
    """
    if choice := choose(shape, config.train, rows, place):
        return choice
    need = smallest(shape, config.train, rows, place.device)
    parts = {"base": need.weights, "adapter": need.adapter + need.optimizer + need.gradients, "activations": need.activations}
    parts |= {"logits": need.logits, "the process itself": need.process + need.lost}
    shown = ", ".join(f"{name} {size / BYTES_PER_GIB:.1f}" for name, size in parts.items() if size)
    why = f"rows of {rows.longest_tokens:,} tokens need {need.gib:.1f} GiB ({shown}); it may take {place.usable_gib:.1f}"
    remedy = ", or ".join(_nearest(shape, config.train, rows, place)) or "a smaller model.name, or a larger card"
    if place.usable_gib == place.limit_gib:
        raise ConfigError(f"this run does not fit train.max_memory_gib={place.limit_gib:g}", why, remedy)
    raise FitError(f"this run does not fit its card, {place.title}", why, remedy)


def _nearest(shape: Shape, train: TrainConfig, rows: Rows, place: Place) -> list[str]:
    """Return settings with which the run fits, as `key=value`: the one that changes least, and shorter rows."""
    free = train.model_copy(update={"micro_batch_size": "auto", "gradient_checkpointing": "auto"})
    quantised = with_base_in(free, "nf4")
    narrow = [
        base.model_copy(update={"lora": train.lora.model_copy(update={"rank": rank})})
        for base in (free, quantised)
        for rank in RANKS
        if rank < train.lora.rank
    ]
    half_free = [train.model_copy(update={name: "auto"}) for name in ("micro_batch_size", "gradient_checkpointing")]
    offers: list[str] = []
    for attempt in (*half_free, free, quantised, *narrow):
        if choice := choose(shape, attempt, rows, place):
            offers.append(_shown(train, choice))
            break
    for attempt in (free, quantised, *narrow[-1:]):

        def fits(num_tokens: int, attempt: TrainConfig = attempt) -> bool:
            return choose(shape, attempt, _cut(rows, num_tokens), place) is not None

        length = _most(fits, rows.longest_tokens)
        if 0 < length < rows.longest_tokens and (choice := choose(shape, attempt, _cut(rows, length), place)):
            offers.append(f"{_shown(train, choice)} data.max_length_tokens={length}".strip())
            break
    return offers


def _cut(rows: Rows, num_tokens: int) -> Rows:
    return Rows(min(rows.longest_tokens, num_tokens), min(rows.most_loss_tokens, num_tokens))


def _shown(before: TrainConfig, choice: Choice) -> str:
    """Write what was changed as `key=value`."""
    after = choice.step.train
    values: dict[str, object] = {"quantization": after.quantization, "precision": after.precision, "lora.rank": after.lora.rank}
    values |= {"micro_batch_size": after.micro_batch_size, "gradient_checkpointing": after.gradient_checkpointing}
    changed = {path: value for path, value in values.items() if attrgetter(path)(before) not in ("auto", value)}
    return " ".join(f"train.{path}={str(value).lower()}" for path, value in changed.items())
