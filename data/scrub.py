"""Takes personal data out of texts: names, mail addresses, phone, card, bank account and Korean resident numbers.

Knows Presidio. Does not know conversations, or where a text came from.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from configs.errors import DataError

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine

REGIONS = ("US", "GB", "KR", "DE", "FR", "ES", "IT", "NL", "IN", "JP", "AU", "BR", "CN", "PL", "TR", "SE")
PLACEHOLDERS = {
    "PERSON": "<PERSON>",
    "EMAIL_ADDRESS": "<EMAIL>",
    "PHONE_NUMBER": "<PHONE>",
    "CREDIT_CARD": "<CARD>",
    "IBAN_CODE": "<IBAN>",
    "KR_RRN": "<RESIDENT_NUMBER>",
}
# How card numbers are written, whatever the network; the check digit decides. The first form takes all digits that stand together, in
# whatever groups; the others stop where an expiry date or a security code may follow.
CARD_FORMS = (
    r"\d(?:[ -]?\d){12,18}(?![ -]?\d)",
    r"\d{13,19}",
    r"\d{4}(?:[ -]\d{4}){3}(?:[ -]\d{3})?",
    r"\d{4}(?:[ -]\d{4}){3}",
    r"\d{4}[ -]\d{6}[ -]\d{4,5}",
)
CARDS = tuple(rf"(?<![\d-])(?<!\d\.){form}(?!\d)" for form in CARD_FORMS)
# Koreans' (1-4) and foreigners' (5-8); those issued since October 2020 have no check digit.
RESIDENT_NUMBER = r"(?<!\d)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?: ?[-–] ?| )?[1-8]\d{6}(?!\d)"
KOREAN_PHONE = r"(?<![\d-])(?:\+?82[ .-]?|0)(?:1[016789]|2|[3-6][1-5]|70|50\d)[ .-]?\d{3,4}[ .-]?\d{4}(?!\d)"
EMAIL = r"(?<![\w.%+-])[\w.!#$%&'*+/=?^`{|}~-]+@(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z][a-z0-9-]*[a-z0-9]"


@dataclass(frozen=True)
class Scrubbed:
    """A text without personal data, and how much of each kind was taken out."""

    text: str
    counts: Counter[str] = field(default_factory=Counter)
    taken: dict[str, str] = field(default_factory=dict, repr=False)
    """Each finding with its placeholder, to take it out of what belongs to the text too; never shown, never written."""


class Scrubber:
    """Takes personal data out of texts, in this process, with nothing sent anywhere."""

    def __init__(self, keep: Iterable[str] = ()) -> None:
        """Load the recognisers, in some seconds.

        Args:
            keep: Words that are no names here, such as those of products.
        """
        self._analyzer = _analyzer(keep)

    def scrub(self, text: str) -> Scrubbed:
        """Return the text with a placeholder for each finding."""
        found = self._analyzer.analyze(text, "en", entities=list(PLACEHOLDERS))
        pieces, counts, taken, at = [], Counter[str](), dict[str, str](), 0
        for one in _without_overlap(found):
            placeholder = PLACEHOLDERS[one.entity_type]
            pieces += [text[at : one.start], placeholder]
            counts[placeholder.strip("<>").lower()] += 1
            taken[text[one.start : one.end]] = placeholder
            at = one.end
        return Scrubbed("".join([*pieces, text[at:]]), counts, taken)


def _without_overlap(found: list[Any]) -> list[Any]:
    """Keep the surest of findings that overlap, or the longest of equally sure ones."""
    kept: list[Any] = []
    for one in sorted(found, key=lambda one: (-one.score, one.start - one.end)):
        if all(one.end <= other.start or one.start >= other.end for other in kept):
            kept.append(one)
    return sorted(kept, key=lambda one: one.start)


@cache
def _model() -> Any:
    """Load spaCy's model once a process; it takes most of a scrubber's time to start."""
    import spacy

    from data.scrub_names import MODEL

    return spacy.load(MODEL, exclude=["parser", "lemmatizer"])


def _analyzer(keep: Iterable[str]) -> "AnalyzerEngine":
    try:
        import regex
        from presidio_analyzer import AnalyzerEngine, Pattern, PatternRecognizer, RecognizerRegistry, RecognizerResult
        from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine
        from presidio_analyzer.predefined_recognizers import CreditCardRecognizer, IbanRecognizer, PhoneRecognizer

        from data.scrub_names import MODEL, NameRecognizer

        model = _model()
    except (ImportError, OSError) as error:
        raise DataError("personal data cannot be taken out", f"{type(error).__name__}: {error}", "make setup") from None

    class CardRecognizer(CreditCardRecognizer):  # type: ignore[misc]
        def analyze(self, text: str, *_: Any, **__: Any) -> list[Any]:
            """Try each form at each place; the base class goes on behind a number with a wrong check digit, and misses one in its midst."""
            spans = {found.span() for form in CARDS for found in regex.finditer(form, text, overlapped=True)}
            return [RecognizerResult("CREDIT_CARD", *span, 1.0) for span in spans if self.validate_result(text[slice(*span)])]

    class Engine(SpacyNlpEngine):  # type: ignore[misc]
        def load(self) -> None:
            """Take the model of our own packages; the base class would download one."""
            self.nlp = {"en": model}

    # Our own recogniser reads spaCy's labels; Presidio would warn of each that it does not know.
    labels = NerModelConfiguration(labels_to_ignore=model.get_pipe("ner").labels)
    engine = Engine(models=[{"lang_code": "en", "model_name": MODEL}], ner_model_configuration=labels)
    engine.load()
    patterns = {"EMAIL_ADDRESS": EMAIL, "PHONE_NUMBER": KOREAN_PHONE, "KR_RRN": RESIDENT_NUMBER}
    recognizers = [
        *(PatternRecognizer(kind, patterns=[Pattern(kind, pattern, 0.95)]) for kind, pattern in patterns.items()),
        CardRecognizer(),
        IbanRecognizer(),
        PhoneRecognizer(supported_regions=REGIONS),
        NameRecognizer(keep),
    ]
    return AnalyzerEngine(registry=RecognizerRegistry(recognizers), nlp_engine=engine)
