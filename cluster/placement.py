"""Which cards a process may train on: those that the queue gave it, or else any of the train pool.

Knows Ray's label selectors and one variable of the environment. Does not know who gives cards.
"""

import os
from collections.abc import Mapping

CARDS_VARIABLE = "TANDEM_CARDS"
HEAD = "head"  # the label of the first machine's cards; one that joined has its own name


def given_cards() -> list[str]:
    """Return the names of the cards that this process was given; none where it may use any train card."""
    return [name for name in os.environ.get(CARDS_VARIABLE, "").split(",") if name]


def card_selector() -> dict[str, str]:
    """Return the labels of the cards that this process may use, as Ray takes them."""
    cards = given_cards()
    if not cards:
        return {"pool": "train"}
    return {"card": cards[0] if len(cards) == 1 else f"in({','.join(cards)})"}


def is_usable(labels: Mapping[str, str]) -> bool:
    """Whether a card with these labels is one of them."""
    return labels.get("card") in cards if (cards := given_cards()) else labels.get("pool") == "train"
