"""Where the trials of a sweep sit that share bases: on cards that have one of its bases now, and on no others.

A base and the trials beside it take their parts of a card one after the other. A trial that sat down where another sweep's base is would
wait for one of its own and keep that other one's trials out, which may be doing the same to it. So a base that still waits for its card
holds nothing, trials train beside those that have theirs, and each seat is looked for among the cards that have a base at that moment.

Knows Ray's placement groups. Does not know what a base is.
"""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import ray
from ray.tune import PlacementGroupFactory
from ray.util.placement_group import PlacementGroup, placement_group

from cluster.placement import CARD, on_cards
from configs.errors import TandemError, last_lines

BASES_SHARE = 0.6  # of a card: over half, so that no card has two; whoever wants a whole card waits for both
TOGETHER_S = 10.0  # that trials wait for the bases of all cards, which on free ones come together
RESTART_S = 30.0  # in which the process of a base that was killed is up again, if its card is still free


log = logging.getLogger("tandem.tune")


class Bases:
    """The bases of a sweep, as its driver sees them; each is on a card, or waits for one."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self.actors = tuple(actors)
        self.answers = {at: actor.load.remote() for at, actor in enumerate(self.actors)}
        self.there: list[int] = []
        ray.wait(list(self.answers.values()), num_returns=len(self.answers), timeout=TOGETHER_S)

    def cards(self) -> list[str]:
        """Return the cards that have a base now; waits until there is one, and a little for one that is being started again.

        Raises:
            TandemError: A base cannot be had on any of them.
        """
        for at in self.there:
            self.answers[at] = self.actors[at].card.remote()
        if known := [self.answers[at] for at in self.there]:
            ray.wait(known, num_returns=len(known), timeout=RESTART_S)
        cards: dict[int, str] = {}
        while not cards:
            told, _ = ray.wait(list(self.answers.values()), num_returns=len(self.answers), timeout=0)
            told = told or ray.wait(list(self.answers.values()))[0]
            found = {at: self._card(at) for at, answer in list(self.answers.items()) if answer in told}
            cards = {at: card for at, card in found.items() if card}
        self.there = list(cards)
        return sorted(cards.values())

    def _card(self, at: int) -> str:
        """Return where a base is; one that cannot be had is left out for good, unless it is the last one."""
        try:
            card: str = ray.get(self.answers[at])
        except (TandemError, ray.exceptions.RayError) as error:
            if len(self.answers) == 1:
                raise
            log.warning("one card has no base, and trials go on without it: %s", last_lines(str(error), 1).strip())
            del self.answers[at]
            return ""
        return card


class Seat(PlacementGroupFactory):  # type: ignore[misc]
    """What a trial beside a base asks for: its part of what the base leaves of a card."""

    bases: ClassVar[Bases | None] = None  # of the process: Tune keeps what trials ask for, and makes it anew

    def __init__(self, num_trials: int) -> None:
        super().__init__([{CARD: int((1 - BASES_SHARE) / num_trials * 10_000) / 10_000}])  # Ray counts in ten thousandths

    def to_placement_group(self) -> PlacementGroup:
        """Ask Ray for it."""
        assert Seat.bases, "bases come before trials"
        return placement_group(self.bundles, bundle_label_selector=[on_cards(Seat.bases.cards())])
