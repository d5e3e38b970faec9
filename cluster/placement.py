"""Which cards a process may train on: those that the queue gave it, or else any of the train pool; and what it asks Ray for there.

Knows Ray's resources and label selectors, how many cores there are, and one variable of the environment. Does not know who gives cards.
"""

import os
from collections.abc import Mapping, Sequence

from cluster.limits import num_cpus

CARDS_VARIABLE = "TANDEM_CARDS"
HEAD = "head"  # the label of the first machine's cards; one that joined has its own name
CARD, SEAT = "card", "seat"
"""Ray's names for a card, which one has alone, and for the place beside it of an engine that can sleep."""
OWN_CORES = "own-cores"  # label of a card that has cores of its own: how many
GPU_SHARE = 0.2
"""Of its card's GPU in Ray's books: it only shows the GPU to a process. Five fit: an engine that sleeps, the job that trains there, its
worker where that stood by, another one that stands by, and one that still ends."""
SLEEPING_GIB = 3.0
"""What an engine that sleeps keeps of its GPU: its context, and the graphs that were recorded."""


def given_cards() -> list[str]:
    """Return the names of the cards that this process was given; none where it may use any train card."""
    return [name for name in os.environ.get(CARDS_VARIABLE, "").split(",") if name]


def card_selector() -> dict[str, str]:
    """Return the labels of the cards that this process may use, as Ray takes them."""
    cards = given_cards()
    return on_cards(cards) if cards else {"pool": "train"}


def on_cards(cards: Sequence[str]) -> dict[str, str]:
    """Return the label of any of these cards, as Ray takes it."""
    return {CARD: cards[0] if len(cards) == 1 else f"in({','.join(cards)})"}


def job_resources(on_gpu: bool) -> dict[str, float]:
    """Return what a process that trains asks Ray for."""
    return {CARD: 1, "CPU": 1, **({"GPU": GPU_SHARE} if on_gpu else {})}


def as_lent(labels: Mapping[str, str], idle_engine: str) -> dict[str, str]:
    """Return a card's labels as a job gets it: a serve card's GPU without what an engine keeps that sleeps there.

    `idle_engine` is what engines do that leave their card: `lending.idle_engine`.
    """
    if labels.get("pool") != "serve" or "gpu-share" not in labels or idle_engine == "stop":
        return dict(labels)
    return {**labels, "memory-gib": f"{max(0.0, float(labels['memory-gib']) - SLEEPING_GIB):g}"}


def is_usable(labels: Mapping[str, str]) -> bool:
    """Whether a card with these labels is one of them."""
    return labels.get("card") in cards if (cards := given_cards()) else labels.get("pool") == "train"


def num_threads(labels: Mapping[str, str], num_sharing: int) -> int:
    """Return how many threads compute on a card without a GPU: as many as it has cores of its own, or else its share of all."""
    return int(labels.get(OWN_CORES, 0)) or max(1, num_cpus() // num_sharing)
