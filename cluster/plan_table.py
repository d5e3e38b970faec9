"""The plan as people read it: a table of what fits on each card, and the best assignment in words.

Knows words and units. Does not reckon anything.
"""

from collections.abc import Sequence

from rich.table import Table

from cluster.assign import TRAINED, Assignment, CardOffers, ServeOffer, TrainOffer
from cluster.home import BYTES_PER_GIB
from cluster.memory import BF16_BYTES, Device, Step, kv_bytes
from cluster.plan import Place, smallest
from cluster.rates import answer_tokens_per_s, train_tokens_per_s
from cluster.shape import Shape
from configs.schema import ChatbotConfig

NUM_TOKENS = 1_000_000  # what a time is told for
FP8 = {True: "", False: ", without FP8: the card has none", None: ", if the card has FP8"}
NO, YES = "[red]no[/]", "[green]yes[/]"
COLUMNS = ("job", "fits", "GiB", "how", "longest", "tokens/s", "1M in")
S_PER_MINUTE, S_PER_HOUR = 60, 3600


def show_model(shape: Shape, config: ChatbotConfig) -> str:
    """Tell a model's size, its adapter's, and what a token takes in the cache."""
    adapter = shape.num_adapter_weights(config.train.lora)
    return (
        f"{config.model.name}: {shape.num_weights / 1e9:.2f} billion weights; an adapter of rank {config.train.lora.rank} has "
        f"{adapter / 1e6:.1f} million; a token takes {kv_bytes(shape, Device(True)) / 1024:.0f} KiB of the cache"
    )


def make_tables(shape: Shape, config: ChatbotConfig, cards: Sequence[CardOffers]) -> list[Table]:
    """Make a table for each card, of all that it could do."""
    tables = []
    for number, card in enumerate(cards):
        table = Table(*COLUMNS, title=f"{chr(10) if number else ''}{card.place.title}", title_justify="left", box=None, pad_edge=False)
        for trained in card.training:
            table.add_row(TRAINED[trained.quantization], *_training(shape, config.train.precision, card.place, trained))
        for served in card.serving:
            table.add_row(show_served(served, card.place), *_serving(shape, card.place, served))
        tables.append(table)
    return tables


def show_served(offer: ServeOffer, place: Place) -> str:
    """Say in which format a base is served."""
    formats = {"none": "bf16" if place.device.value_bytes == BF16_BYTES else "fp32", "fp8": "8 bit", "bitsandbytes": "4 bit"}
    return f"serve {formats[offer.quantization]}"


def _training(shape: Shape, precision: str, place: Place, offer: TrainOffer) -> tuple[str, ...]:
    fp8 = FP8[place.has_fp8] if precision == "fp8" and offer.quantization == "none" else ""
    longest = f"{offer.longest_row_tokens:,}" if offer.longest_row_tokens else ""
    if offer.choice is None:
        need = smallest(shape, offer.train, offer.rows, place.device)
        return NO, f"{need.gib:.1f}", f"may take {place.usable_gib:.1f}{fp8}", longest, "", ""
    step = offer.choice.step
    how = f"{step.size} at once{', recomputed' if step.recomputes else ''}{fp8}"
    speed = train_tokens_per_s(step, place.rate) if place.rate and place.rate.is_of(step.train) else None
    return YES, f"{offer.choice.need.gib:.1f}", how, longest, _speed(speed), show_time(NUM_TOKENS / speed) if speed else ""


def _serving(shape: Shape, place: Place, offer: ServeOffer) -> tuple[str, ...]:
    engine, device = offer.engine, place.device
    if not offer.fits:
        return NO, f"{engine.need.gib:.1f}", "too little left for a request", "", "", ""
    how = f"{offer.num_at_once} at once, cache {engine.cache_bytes / BYTES_PER_GIB:.1f} GiB"
    # How fast a quantised base answers, nobody has measured.
    speed = answer_tokens_per_s(shape, device, place.rate) if place.rate and offer.quantization == "none" else None
    return YES, f"{engine.need.gib:.1f}", how, f"{offer.longest_context_tokens:,}", _speed(speed), ""


def _speed(tokens_per_s: float | None) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s else "unknown"


def show_time(seconds: float) -> str:
    """Write seconds as people say them."""
    if seconds < S_PER_MINUTE:
        return f"{seconds:.0f} s"
    return f"{seconds / S_PER_MINUTE:.0f} min" if seconds < S_PER_HOUR else f"{seconds / S_PER_HOUR:.1f} h"


def show_assignment(best: Assignment, config: ChatbotConfig) -> list[str]:
    """Tell who does what, and the settings that it takes where they are not the config's own."""
    lines, changes = [], []
    for place, trained in best.training:
        if trained is None or trained.choice is None:
            lines.append(f"[red]{place.name} would train, and nothing fits it[/]")
            continue
        lines.append(f"[bold]{place.name}[/] trains: {TRAINED[trained.quantization]}, {show_size(trained.choice.step)}")
        formats = {name: getattr(trained.train, name) for name in ("quantization", "precision")}
        changes += [f"train.{name}={value}" for name, value in formats.items() if value != getattr(config.train, name)]
    for place, served in best.serving:
        if served is None:
            lines.append(f"[red]{place.name} would answer, and nothing fits it[/]")
            continue
        kind = show_served(served, place).removeprefix("serve ")
        num_tokens = f"{config.serve.max_model_len_tokens:,}"
        lines.append(f"[bold]{place.name}[/] answers: {kind}, {served.num_at_once} requests of {num_tokens} tokens at once")
        changes += [] if served.is_own else [f"serve.quantization={served.quantization}"]
    return [*lines, *([f"set: {' '.join(dict.fromkeys(changes))}"] if changes else [])]


def show_size(step: Step) -> str:
    """Tell a step's micro-batch."""
    rows = "one conversation" if step.size == 1 else f"{step.size} conversations"
    return f"{rows} at once{', activations recomputed' if step.recomputes else ''}"
