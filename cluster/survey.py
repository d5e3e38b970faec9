"""The cards that a plan is made for: those that somebody names, or this machine's, measured where that is wished.

Knows the command line's words for cards, and where a card's rate comes from. Does not know what fits.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cluster.cards import Card, cpu_has_bf16, find_cards
from cluster.measure import measure_card
from cluster.memory import Device, Rows
from cluster.placement import num_threads
from cluster.plan import Place, require_fit, settle, suited, value_bytes
from cluster.rates import find_rate
from cluster.shape import Shape
from configs.errors import ConfigError
from configs.schema import ChatbotConfig, MachineConfig

MAX_CARDS = 8


def parse_cards(text: str, precision: str) -> list[Place]:
    """Read `rtx5090:31,rtx5060ti:15`: names with memory in GiB; one alone is shared half and half, as `up` does.

    Raises:
        ConfigError: It is written otherwise.
    """
    found = [re.fullmatch(r"\s*([A-Za-z0-9][A-Za-z0-9 ._-]*):([0-9]{1,5}(?:\.[0-9]+)?)\s*", word) for word in text.split(",")]
    cards = [(match[1], float(match[2])) for match in found if match and float(match[2]) > 0]
    if len(cards) < len(found) or len(cards) > MAX_CARDS:
        why = f"each is a name, a colon and its memory in GiB; at most {MAX_CARDS} of them"
        raise ConfigError(f"--cards {text!r} names no cards", why, "--cards rtx5090:31,rtx5060ti:15")
    if len(cards) == 1:
        cards = [(f"half of {cards[0][0]}", cards[0][1] / 2)] * 2
    names = [name for name, _ in cards]
    places = []
    for number, (name, memory_gib) in enumerate(cards):
        on_gpu = not name.lower().endswith("cpu")
        shown = f"{name} #{names[: number + 1].count(name)}" if names.count(name) > 1 else name
        device = Device(on_gpu, value_bytes(precision, has_bf16=on_gpu or cpu_has_bf16()))
        # Of a GPU that is but a name nobody knows whether it has FP8.
        places.append(Place(shown, memory_gib, device, find_rate(name) if on_gpu else None, has_fp8=None if on_gpu else False))
    return places


def place_of(card: Card, precision: str) -> Place:
    """Return a card of this machine as the plan sees it."""
    has_bf16 = card.gpu.has_bf16 if card.gpu else cpu_has_bf16()
    device = Device(card.gpu is not None, value_bytes(precision, has_bf16))
    rate, has_fp8 = find_rate(card.accelerator, num_threads(card.labels, num_sharing=1)), bool(card.gpu and card.gpu.has_fp8)
    return Place(f"{card.name} ({card.accelerator})", card.memory_gib, device, rate, has_fp8=has_fp8)


def find_places(machine: MachineConfig, precision: str) -> list[Place]:
    """Return this machine's cards as the plan sees them.

    Raises:
        ClusterError: The machine's config names a GPU that is not there.
    """
    return [place_of(card, precision) for card in find_cards(machine)]


def measure_places(machine: MachineConfig, config: ChatbotConfig, shape: Shape, model: Mapping[str, Any]) -> tuple[list[Place], str]:
    """Return this machine's cards, with the rate that the first train card shows; and in words what it took.

    Raises:
        ClusterError: The config's training does not fit that card, or its steps failed.
    """
    cards = find_cards(machine)
    card = next(card for card in cards if card.pool == "train")
    rows = Rows(config.data.max_length_tokens, config.data.max_length_tokens)
    place = replace(place_of(card, config.model.precision), limit_gib=config.train.max_memory_gib)
    config = config.model_copy(update={"train": suited(config.train, place)})
    choice = require_fit(shape, config, rows, place)
    found = measure_card(card, config.model_copy(update={"train": settle(config.train, choice)}), model)
    places = [place_of(other, config.model.precision) for other in cards]
    rate = found.rate(choice.step)
    alike = [other.accelerator == card.accelerator and other.num_cpus == card.num_cpus for other in cards]
    words = f"measured on {card.name}: {found.tokens_per_s:,.0f} tokens/s, {found.taken_gib:.1f} GiB taken ({choice.need.gib:.1f} planned)"
    return [replace(place, rate=rate) if same else place for place, same in zip(places, alike, strict=True)], words
