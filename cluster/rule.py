"""Who may use a card now: one pure function from what is seen to what is to be done, each with its reason in words.

Knows cards, how many engines chat wants, and the line of jobs. Does not know Ray, time's passing or how anything is done; it remembers
nothing, so that it says the same again until it is done, whoever was killed meanwhile.

    1. Chat comes first on serve cards. A job that was lent one leaves as soon as chat wants it.
    2. Jobs stand in line: training before sweeps, then by priority, then by age. Nobody passes one who waits for the same card.
    3. A job takes free cards; else one that quiet chat lends, or that an engine is a guest on; else one of a job that ranks below it.
       One that falls asleep for a job has it already: Ray hands it over when the engine has let go.
    4. Who has a card keeps it for `min_hold_s` against other jobs. Chat takes its own at once, and lends after `quiet_after_s`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from configs.schema import LendingConfig

SERVE, TRAIN, SWEEP = "serve", "train", "sweep"
RANKS = {TRAIN: 0, SWEEP: 1}
ASLEEP_WITHIN_S = 60.0  # an 8B engine on an H200 took 10; what has not slept by then is not waited for


@dataclass(frozen=True)
class Card:
    """A card as it is seen now; which jobs have it, the jobs know."""

    name: str
    pool: str
    memory_gib: float = math.inf
    is_alive: bool = True
    engine_since_s: float | None = None
    """Since when an engine has it; None where none has."""
    is_seated: bool = False
    """An engine's process is there that can sleep; without `engine_since_s` it does, or waits for the card."""
    is_answering: bool = False
    """That engine has begun to take requests: it can be told to sleep."""
    is_called: bool = False
    """That engine waits for the card, and would for no other."""
    is_foreign: bool = False
    """Somebody has it who never stood in line, such as a run begun in a shell."""


@dataclass(frozen=True)
class Chat:
    """What chat's config asks for, and how chat stands; without chat all is zero."""

    min_engines: int = 0
    max_engines: int = 0
    uses_train_cards: bool = False
    num_wanted: int = 0
    """Engines wanted for the requests that there are, placed or not, within the bounds now in force; not those that sleep."""
    quiet_s: float = math.inf
    """Since the last request ended; 0 while one is answered or waits."""


@dataclass(frozen=True)
class Job:
    """A job in line: waiting, or with cards and running or asked to leave them."""

    id: int
    kind: Literal["train", "sweep"]
    state: Literal["waiting", "running", "leaving"] = "waiting"
    priority: int = 0
    place: float = 0.0
    """What comes first among equals has the smaller one."""
    num_cards: int = 1
    memory_gib: float = 0.0
    """Least memory of a card that it can use."""
    cards: tuple[str, ...] = ()
    since_s: float = 0.0
    """Since when it has its cards."""
    ends_at: str = ""
    """When it is thought to end, in words; empty where nothing is known."""

    @property
    def rank(self) -> tuple[int, int]:
        """Kind and priority: the smaller goes before, whatever the age."""
        return RANKS[self.kind], -self.priority


@dataclass(frozen=True)
class Snapshot:
    """All that the rule looks at."""

    now_s: float
    cards: tuple[Card, ...]
    chat: Chat
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Start:
    """Let a waiting job begin, or go on, on these cards."""

    job: int
    cards: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Leave:
    """Ask a running job to save its state and leave its cards."""

    job: int
    reason: str
    for_job: int | None = None
    """Whom it makes room for; None is chat."""


@dataclass(frozen=True)
class Decision:
    """What is to be done, and why the others wait."""

    actions: tuple[Start | Leave, ...]
    num_engines: tuple[int, int]
    """Fewest and most engines that chat may have now; fewer than its config says is sleep, more train cards is growth."""
    engines_reason: str
    bedtimes: tuple[str, ...]
    """Cards whose engines are to go to sleep."""
    waits: dict[int, str]
    """Why each waiting job waits."""
    next_job: int | None = None
    """Whose process may get ready before it has cards: the first that waits for one that chat may lend, for a while and at any moment."""


def decide(seen: Snapshot, lending: LendingConfig) -> Decision:
    """Say who is to start, who is to leave, and how many engines chat may have."""
    hand = _Hand(seen, lending)
    hand.let_go_of_what_engines_have()
    hand.give_chat_its_own()
    for job in sorted((job for job in seen.jobs if job.state == "waiting"), key=lambda job: (job.rank, job.place, job.id)):
        hand.place(job)
    return Decision(tuple(hand.actions), *hand.bounds(), hand.bedtimes(), hand.waits, hand.next_job)


@dataclass
class _Hand:
    """The cards as they are handed out, from the first in line to the last."""

    seen: Snapshot
    lending: LendingConfig
    actions: list[Start | Leave] = field(default_factory=list)
    waits: dict[int, str] = field(default_factory=dict)
    given_back: set[str] = field(default_factory=set)
    """Cards that engines are to leave."""
    kept: dict[str, str] = field(default_factory=dict)
    """For whom a card is kept that is free, or becomes so."""
    next_job: int | None = None

    def __post_init__(self) -> None:
        seen, chat = self.seen, self.seen.chat
        self.holders = {name: job for job in seen.jobs if job.state != "waiting" for name in job.cards}
        alive = [card for card in seen.cards if card.is_alive]
        self.engines = [card for card in alive if card.engine_since_s is not None]
        free = [card for card in alive if card not in self.engines and card.name not in self.holders and not card.is_foreign]
        self.free = sorted(free, key=lambda card: card.pool == SERVE)  # a train card first
        self.coming = [card for card in alive if card.name in self.holders and self.holders[card.name].state == "leaving"]
        self.is_quiet = chat.quiet_s >= self.lending.quiet_after_s

    def let_go_of_what_engines_have(self) -> None:
        """Have jobs leave cards that an engine was quicker to take, when their process was killed and begun anew, or did not give back."""
        taken = {card.name for card in self.engines if not card.is_seated}
        awake = {card.name for card in self.engines if card.is_seated and card.is_answering}
        for job in self.seen.jobs:
            if job.state == "running" and not taken.isdisjoint(job.cards):
                self.actions.append(Leave(job.id, "an engine took its card while it began anew"))
            elif job.state == "running" and not awake.isdisjoint(job.cards):
                if not self.is_quiet:
                    self.actions.append(Leave(job.id, "chat has requests again, and its engine did not fall asleep"))
                elif self.seen.now_s - job.since_s > ASLEEP_WITHIN_S:
                    self.actions.append(Leave(job.id, f"the engine on its card did not fall asleep within {ASLEEP_WITHIN_S:.0f} s"))

    def give_chat_its_own(self) -> None:
        """Keep serve cards free for the engines that chat wants, and call back those that are lent."""
        called = {card.name for card in self.seen.cards if card.is_alive and card.is_called}
        num_missing = min(self.seen.chat.num_wanted, self.seen.chat.max_engines) - len(self.engines) - len(called)
        for cards in (self.free, self.coming):
            others = [card for card in cards if card.pool == SERVE and card.name not in called][: max(0, num_missing)]
            num_missing -= len(others)
            for card in [*others, *(card for card in cards if card.name in called)]:
                cards.remove(card)
                self.kept[card.name] = "chat"
        lent = {self.holders[card.name].id: self.holders[card.name] for card in self.seen.cards if self._is_lent(card)}
        for job in sorted((job for job in lent.values() if job.state == "running"), key=_least_first):
            names = [card.name for card in self.seen.cards if card.name in job.cards and card.pool == SERVE and card.is_alive]
            if num_missing > 0 or not called.isdisjoint(names):
                self.actions.append(Leave(job.id, f"chat wants {' and '.join(names)} back: an engine waits for it"))
                num_missing -= len(set(names) - called)

    def place(self, job: Job) -> None:
        """Start a job, or see to it that cards become free for it; what it waits for, nobody behind it gets."""
        usable = [card for card in self.seen.cards if card.is_alive and self._suits(card, job)]
        if len(usable) < job.num_cards:
            self.waits[job.id] = f"it needs {_count(job.num_cards)}{_of_memory(job)}, and there {_are(len(usable))}"
            return
        free = [card for card in self.free if self._suits(card, job)]
        if len(free) >= job.num_cards:
            num_cards = max(job.num_cards, sum(card.pool == TRAIN for card in free)) if job.kind == SWEEP else job.num_cards
            self._start(job, free[:num_cards])
            return
        claimed = [*free, *(card for card in self.coming if self._suits(card, job))][: job.num_cards]
        self._keep_for(job, claimed)
        num_missing = job.num_cards - len(claimed)
        lent = self._guests(job)[:num_missing]
        if len(claimed) == len(free) and self._fall_asleep(lent, num_missing):
            self._start(job, [*free, *lent])
            return
        below = self._below(job, num_missing - len(lent))
        num_below = sum(self._num_suitable(other, job) for other in below)
        if len(lent) + num_below >= num_missing:
            self.given_back |= {
                card.name for card in lent[: max(0, num_missing - num_below)]
            }  # one that leaves may leave more than is missing
            for other in below:
                self.actions.append(Leave(other.id, f"job {job.id} goes before it", for_job=job.id))
        self.waits[job.id] = self._reason(job, usable)
        if self.next_job is None and job.kind == "train" and any(card.pool == SERVE for card in usable):
            self.next_job = job.id

    def bounds(self) -> tuple[tuple[int, int], str]:
        """Return the fewest and most engines that chat may have now, and why."""
        chat = self.seen.chat
        started = {name for action in self.actions if isinstance(action, Start) for name in action.cards}
        serve = [card for card in self.seen.cards if card.pool == SERVE and card.is_alive]
        lent = [card for card in serve if card.name in self.holders or card.name in started or card.name in self.given_back]
        ending = [card for card in self.engines if card.name in self.given_back and not card.is_seated]
        guests = [card for card in self.engines if card.pool == TRAIN and card.name not in self.given_back]
        idle = [card for card in self.free if card.pool == TRAIN and card.name not in started]
        num_train = len(guests) + len(idle) if chat.uses_train_cards else 0
        num_leaving = sum(card.pool == TRAIN for card in self.engines if card.name in self.given_back)
        room = len(self.engines) - num_leaving if num_leaving else len(serve) + num_train
        most = max(1, min(chat.max_engines, room))
        fewest = min(chat.min_engines, most)
        if self.is_quiet and (lent or ending):
            fewest = min(fewest, len(serve) - sum(not card.is_seated for card in lent) + len(guests))
            asleep = [card for card in serve if card.is_seated and card.engine_since_s is None]
            fewest = min(fewest, len(self.engines) + len(asleep) - len(ending)) if ending else fewest
            return (fewest, most), f"chat is quiet, and leaves {_count(len(lent) or num_leaving)} to jobs"
        return (fewest, most), "" if most == chat.max_engines else f"{_count(room)} for engines"

    def bedtimes(self) -> tuple[str, ...]:
        """Return the cards whose engines keep their process, and are to give the card back: a job was given it, or is to get it."""
        given = {name for name, job in self.holders.items() if job.state == "running"} if self.is_quiet else set()
        wanted = self.given_back | given | {name for action in self.actions if isinstance(action, Start) for name in action.cards}
        return tuple(card.name for card in self.engines if card.is_seated and card.name in wanted)

    def _start(self, job: Job, cards: list[Card]) -> None:
        self.free = [card for card in self.free if card not in cards]
        lent = [card.name for card in cards if card.pool == SERVE]
        why = f"{' and '.join(lent)} {'is' if len(lent) == 1 else 'are'} lent by chat, which does not need it" if lent else "it is its turn"
        self.actions.append(Start(job.id, tuple(card.name for card in cards), why))

    def _keep_for(self, job: Job, cards: list[Card]) -> None:
        self.kept |= {card.name: f"job {job.id}" for card in cards}
        self.free = [card for card in self.free if card not in cards]
        self.coming = [card for card in self.coming if card not in cards]

    def _guests(self, job: Job) -> list[Card]:
        """Cards that an engine can leave for a job: of quiet chat any, else those in the train pool beyond chat's own number."""
        taken = self.given_back | self.holders.keys()
        engines = [card for card in sorted(self.engines, key=lambda card: card.pool == SERVE) if card.name not in taken]
        found = [card for card in engines if self._suits(card, job) and (self.is_quiet or self._is_held_long_enough(card))]
        if self.is_quiet:
            return found
        num_own = sum(card.pool == SERVE and card.is_alive for card in self.seen.cards) if self.lending.enabled else 1
        return found[: max(0, len(engines) - max(1, num_own))]

    def _fall_asleep(self, lent: list[Card], num_missing: int) -> bool:
        """Whether engines give back all that is missing without ending: the first in line asks for it now, and has it when they sleep."""
        return not self.waits and self.is_quiet and len(lent) == num_missing and all(card.is_seated for card in lent)

    def _is_held_long_enough(self, card: Card) -> bool:
        return card.pool == TRAIN and self.seen.now_s - (card.engine_since_s or 0.0) >= self.lending.min_hold_s

    def _below(self, job: Job, num_missing: int) -> list[Job]:
        """Jobs that rank below, least first, until enough cards are found; those that were told to leave already do not count."""
        leaving = {action.job for action in self.actions if isinstance(action, Leave)}
        found: list[Job] = []
        for other in sorted(self.seen.jobs, key=_least_first):
            is_below = other.state == "running" and other.rank > job.rank and other.id not in leaving
            has_held = self.seen.now_s - other.since_s >= self.lending.min_hold_s
            if num_missing > 0 and is_below and has_held and (num_suitable := self._num_suitable(other, job)):
                found.append(other)
                num_missing -= num_suitable
        return found

    def _num_suitable(self, other: Job, job: Job) -> int:
        """How many of another job's cards would be of use."""
        return sum(card.name in other.cards and card.is_alive and self._suits(card, job) for card in self.seen.cards)

    def _suits(self, card: Card, job: Job) -> bool:
        return card.memory_gib >= job.memory_gib and (card.pool == TRAIN or self.lending.enabled)

    def _is_lent(self, card: Card) -> bool:
        return card.pool == SERVE and card.is_alive and card.name in self.holders

    def _reason(self, job: Job, usable: Iterable[Card]) -> str:
        """Say who has the cards that it could use."""
        others = "; ".join(f"{card.name} {self._told(card, job)}" for card in usable)
        is_too_small = any(card.is_alive and card.memory_gib < job.memory_gib for card in self.seen.cards)
        return f"it needs {_count(job.num_cards)}{_of_memory(job)}: {others}" if is_too_small else others

    def _told(self, card: Card, job: Job) -> str:
        if holder := self.holders.get(card.name):
            going = ", asked to leave" if holder.state == "leaving" or any(action.job == holder.id for action in self.actions) else ""
            return f"busy with job {holder.id}{f' until about {holder.ends_at}' if holder.ends_at and not going else ''}{going}"
        if card.name in self.given_back:
            return "is given back by chat"
        if card in self.engines:
            return "answers chat"
        if card.is_foreign:
            return "busy with a run that is not in the queue"
        keeper = self.kept.get(card.name, "")
        return f"is kept for {keeper}" if keeper and keeper != f"job {job.id}" else "is free"


def _least_first(job: Job) -> tuple[int, int, float]:
    """Order those who may have to leave: the last in line, and of equals the youngest, which loses least."""
    kind, priority = job.rank
    return -kind, -priority, -job.since_s


def _count(number: int) -> str:
    return f"{number} card" if number == 1 else f"{number} cards"


def _are(number: int) -> str:
    return f"is {number}" if number == 1 else f"are {number}"


def _of_memory(job: Job) -> str:
    return f" of {job.memory_gib:g} GiB" if job.memory_gib else ""
