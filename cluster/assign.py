"""Which card does which job: what each could train and serve, and the best way to share the jobs out.

Knows offers and how to compare them. Does not know how memory or speed are reckoned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from cluster.memory import Engine, Rows, plan_engine
from cluster.plan import Choice, Place, choose, longest_row, suited, with_base_in
from cluster.rates import UNKNOWN, train_tokens_per_s
from cluster.shape import Shape
from configs.errors import ClusterError
from configs.schema import ChatbotConfig, ServeConfig, TrainConfig

TRAINED = {"none": "LoRA", "nf4": "QLoRA"}
SERVED = {"none": "full precision", "fp8": "8 bit", "bitsandbytes": "4 bit"}


@dataclass(frozen=True)
class TrainOffer:
    """What one card could train."""

    train: TrainConfig
    """The settings with the base as it would be."""
    is_own: bool
    """Whether it is what the config says."""
    rows: Rows
    """As long as the config lets them be, all with loss."""
    choice: Choice | None
    longest_row_tokens: int

    @property
    def quantization(self) -> str:
        """The base's format."""
        return self.train.quantization

    @property
    def fits(self) -> bool:
        """Whether it can be trained with the config's rows."""
        return self.choice is not None


@dataclass(frozen=True)
class ServeOffer:
    """What one card could serve."""

    quantization: str
    is_own: bool
    """Whether it is what the config says."""
    engine: Engine
    num_at_once: int
    """Requests of full length that the cache holds, and the engine computes."""
    longest_context_tokens: int

    @property
    def fits(self) -> bool:
        """Whether a request of full length can be answered."""
        return self.num_at_once > 0


@dataclass(frozen=True)
class CardOffers:
    """What one card could do."""

    place: Place
    training: tuple[TrainOffer, ...]
    serving: tuple[ServeOffer, ...]


@dataclass(frozen=True)
class Assignment:
    """A job for each card; offers are None where nothing fits."""

    training: tuple[tuple[Place, TrainOffer | None], ...]
    serving: tuple[tuple[Place, ServeOffer | None], ...]

    @property
    def fits(self) -> bool:
        """Whether each card has something to do that it can."""
        return all(offer for _, offer in (*self.training, *self.serving))


def offers_of(shape: Shape, config: ChatbotConfig, place: Place) -> CardOffers:
    """Return what a card could do with a chatbot, its own settings first; rows are as long as the config lets them be."""
    rows = Rows(config.data.max_length_tokens, config.data.max_length_tokens)
    limited = replace(place, limit_gib=config.train.max_memory_gib)
    training = [_training(shape, config.train, rows, limited, kind) for kind in _own_first(config.train.quantization, TRAINED)]
    kinds = _own_first(config.serve.quantization, SERVED) if place.device.on_gpu else ["none"]
    return CardOffers(limited, tuple(training), tuple(_serving(shape, config.serve, place, kind) for kind in kinds))


def _own_first(own: str, kinds: dict[str, str]) -> list[str]:
    return [own, *(kind for kind in kinds if kind != own)]


def _training(shape: Shape, train: TrainConfig, rows: Rows, place: Place, kind: str) -> TrainOffer:
    changed = suited(with_base_in(train, kind), place)
    return TrainOffer(changed, changed == train, rows, choose(shape, changed, rows, place), longest_row(shape, changed, place))


def _serving(shape: Shape, serve: ServeConfig, place: Place, kind: str) -> ServeOffer:
    engine = plan_engine(shape, serve.model_copy(update={"quantization": kind}), place.device, place.memory_gib)
    num_at_once = min(serve.max_num_seqs, engine.num_cache_tokens // serve.max_model_len_tokens)
    return ServeOffer(kind, kind == serve.quantization, engine, num_at_once, min(engine.num_cache_tokens, shape.max_context_tokens))


def assign(cards: Sequence[CardOffers], num_engines: int = 1) -> Assignment:
    """Return the best way to share out training and serving: all fits, then the config's own settings, then training's speed."""
    ways = [way for way in product((True, False), repeat=len(cards)) if any(way) and way.count(False) >= num_engines]
    if not ways:
        why = f"{num_engines} engines always run (serve.scaling.min_replicas), and one card trains"
        raise ClusterError(f"{len(cards)} cards are too few", why, f"serve.scaling.min_replicas={max(1, len(cards) - 1)}, or more cards")
    return max((_make(cards, way) for way in ways), key=_score)


def _make(cards: Sequence[CardOffers], trains: tuple[bool, ...]) -> Assignment:
    """Give the cards that train one way to train that fits them all; each of the others serves in the first way that fits it."""
    trainers = [card for card, chosen in zip(cards, trains, strict=True) if chosen]
    kinds = [offer.quantization for offer in trainers[0].training]
    common = [kind for kind in kinds if all(_offer(card, kind).fits for card in trainers)]
    training = tuple((card.place, _offer(card, common[0]) if common else None) for card in trainers)
    servers = [card for card, chosen in zip(cards, trains, strict=True) if not chosen]
    return Assignment(training, tuple((card.place, next((offer for offer in card.serving if offer.fits), None)) for card in servers))


def _offer(card: CardOffers, kind: str) -> TrainOffer:
    return next(offer for offer in card.training if offer.quantization == kind)


def _score(way: Assignment) -> tuple[float, ...]:
    """All fits; as the config has it; training's speed, and its memory where nobody knows speeds; requests at once."""
    trained = [(place, offer.choice.step) for place, offer in way.training if offer and offer.choice]
    served = [offer for _, offer in way.serving if offer]
    num_own = [sum(offer.is_own for _, offer in jobs if offer) / len(jobs) for jobs in (way.training, way.serving)]
    return (
        len(trained) == len(way.training),
        len(served) == len(way.serving),
        sum(num_own),
        sum(train_tokens_per_s(step, place.rate or UNKNOWN) for place, step in trained),
        sum(place.memory_gib for place, _ in way.training),
        sum(offer.num_at_once for offer in served),
    )
