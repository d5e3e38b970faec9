"""Takes personal data out of texts: names, mail addresses, phone, card, bank account and Korean resident numbers.

Knows Presidio. Does not know conversations, or where a text came from.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
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
# Card numbers of every network; the check digit decides.
CARD = r"(?<![\d-])(?<!\d\.)(?:\d[ -]?){12,18}\d(?![\d-]*\d)"
# Koreans' (1-4) and foreigners' (5-8); those issued since October 2020 have no check digit.
RESIDENT_NUMBER = r"(?<!\d)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?: ?[-–] ?| )?[1-8]\d{6}(?!\d)"
KOREAN_PHONE = r"(?<![\d-])(?:\+?82[ .-]?|0)(?:1[016789]|2|[3-6][1-5]|70|50\d)[ .-]?\d{3,4}[ .-]?\d{4}(?!\d)"
EMAIL = r"(?<![\w.%+-])[\w.!#$%&'*+/=?^`{|}~-]+@(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z][a-z0-9-]*[a-z0-9]"


@dataclass(frozen=True)
class Scrubbed:
    """A text without personal data, and how much of each kind was taken out; never the data itself."""

    text: str
    counts: Counter[str]


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
        pieces, counts, at = [], Counter[str](), 0
        for one in _without_overlap(found):
            placeholder = PLACEHOLDERS[one.entity_type]
            pieces += [text[at : one.start], placeholder]
            counts[placeholder.strip("<>").lower()] += 1
            at = one.end
        return Scrubbed("".join([*pieces, text[at:]]), counts)


def _without_overlap(found: list[Any]) -> list[Any]:
    """Keep the surest of findings that overlap, or the longest of equally sure ones."""
    kept: list[Any] = []
    for one in sorted(found, key=lambda one: (-one.score, one.start - one.end)):
        if all(one.end <= other.start or one.start >= other.end for other in kept):
            kept.append(one)
    return sorted(kept, key=lambda one: one.start)


def _analyzer(keep: Iterable[str]) -> "AnalyzerEngine":
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine, Pattern, PatternRecognizer, RecognizerRegistry
        from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine
        from presidio_analyzer.predefined_recognizers import CreditCardRecognizer, IbanRecognizer, PhoneRecognizer

        from data.scrub_names import MODEL, NameRecognizer

        model = spacy.load(MODEL, exclude=["parser", "lemmatizer"])
    except (ImportError, OSError) as error:
        raise DataError("personal data cannot be taken out", f"{type(error).__name__}: {error}", "make setup") from None

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
        CreditCardRecognizer(patterns=[Pattern("card", CARD, 0.3)]),
        IbanRecognizer(),
        PhoneRecognizer(supported_regions=REGIONS),
        NameRecognizer(keep),
    ]
    return AnalyzerEngine(registry=RecognizerRegistry(recognizers), nlp_engine=engine)
