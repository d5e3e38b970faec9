"""Where the trials of a sweep sit that share bases: on cards that have one of its bases now, and on no others.

A base and the trials beside it take their parts of a card one after the other. A trial that sat down where another sweep's base is would
wait for one of its own and keep that other one's trials out, which may be doing the same to it. So a base that still waits for its card
holds nothing, trials train beside those that have theirs, and each seat is looked for among the cards that have a base at that moment.

Knows Ray's placement groups. Does not know what a base is.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import ray
from ray.tune import PlacementGroupFactory
from ray.util.placement_group import PlacementGroup, placement_group

from cluster.placement import CARD, on_cards

BASES_SHARE = 0.6  # of a card: over half, so that no card has two; whoever wants a whole card waits for both
RESTART_S = 30.0  # in which the process of a base that was killed is up again, if its card is still free


class Bases:
    """The bases of a sweep, as its driver sees them; each is on a card, or waits for one."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self.actors = tuple(actors)
        self.answers = [actor.load.remote() for actor in self.actors]
        self.there: list[int] = []

    def cards(self) -> list[str]:
        """Return the cards that have a base now; waits until there is one, and a little for one that is being started again.

        Raises:
            TandemError: A base cannot be had, wherever it is.
        """
        for at in self.there:
            self.answers[at] = self.actors[at].card.remote()
        if known := [self.answers[at] for at in self.there]:
            ray.wait(known, num_returns=len(known), timeout=RESTART_S)
        told, _ = ray.wait(self.answers, num_returns=len(self.answers), timeout=0)
        told = told or ray.wait(self.answers)[0]
        self.there = [at for at, answer in enumerate(self.answers) if answer in told]
        return sorted(ray.get(told))


class Seat(PlacementGroupFactory):  # type: ignore[misc]
    """What a trial beside a base asks for: its part of what the base leaves of a card."""

    bases: ClassVar[Bases | None] = None  # of the process: Tune keeps what trials ask for, and makes it anew

    def __init__(self, num_trials: int) -> None:
        super().__init__([{CARD: int((1 - BASES_SHARE) / num_trials * 10_000) / 10_000}])  # Ray counts in ten thousandths

    def to_placement_group(self) -> PlacementGroup:
        """Ask Ray for it."""
        assert Seat.bases, "bases come before trials"
        return placement_group(self.bundles, bundle_label_selector=[on_cards(Seat.bases.cards())])
