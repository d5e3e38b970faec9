"""README.ko.md says what README.md says: section by section the same blocks, code, names in code, links, pictures and numbers.

The words are the translator's; this compares what can be compared without them, and names each section of README.md that the Korean
one does not follow. Korean may have figures where English has words ("two seconds"), and not the other way round. The parser is
markdown-it-py, which rich brings along.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import zip_longest

import pytest
from markdown_it import MarkdownIt

from configs.loader import ROOT

ENGLISH, KOREAN = "README.md", "README.ko.md"
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass
class Section:
    """What stands under one heading, up to the next one."""

    name: str
    blocks: list[str] = field(default_factory=list)  # the heading's level, paragraphs, lists, tables with their rows and cells, in order
    code: list[str] = field(default_factory=list)  # the lines of all code blocks, with their fences
    names: list[str] = field(default_factory=list)  # `code` in the text
    links: list[str] = field(default_factory=list)  # targets of links and pictures, in order
    numbers: list[str] = field(default_factory=list)


def read(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def sections(text: str) -> list[Section]:
    found: list[Section] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for token, following in zip_longest(tokens, tokens[1:]):
        if token.type == "heading_open":
            found.append(Section(f"{token.markup} {following.content} (line {token.map[0] + 1})"))
        section = found[-1]
        if token.type in ("fence", "code_block"):
            section.code += [f"```{token.info}", *token.content.splitlines(), "```"]
        if token.type != "inline" and token.nesting >= 0:
            section.blocks.append(token.tag or token.type)
        for part in token.children or []:
            if part.type == "code_inline":
                section.names.append(f"`{part.content}`")
            elif part.type in ("link_open", "image"):
                section.links.append(str(part.attrs.get("href") or part.attrs.get("src")))
            elif part.type == "text":
                section.numbers += NUMBER.findall(part.content)
    return found


def pairs(english: list[Section], korean: list[Section]) -> Iterator[tuple[Section | None, Section | None]]:
    """Each section with its translation, also where one was put in or taken out between others."""

    def key(section: Section) -> tuple[object, ...]:
        return section.blocks[0], tuple(section.code), tuple(sorted(section.names))

    alike = SequenceMatcher(None, [key(section) for section in english], [key(section) for section in korean], autojunk=False)
    for _, start, end, korean_start, korean_end in alike.get_opcodes():
        yield from zip_longest(english[start:end], korean[korean_start:korean_end])


def compared(what: str, english: list[str], korean: list[str], ordered: bool = True) -> Iterator[str]:
    missing, left_over = Counter(english) - Counter(korean), Counter(korean) - Counter(english)
    if missing:
        yield f"{what} only in {ENGLISH}: {' | '.join(missing.elements())}"
    if left_over:
        yield f"{what} only in {KOREAN}: {' | '.join(left_over.elements())}"
    if ordered and not missing and not left_over and english != korean:
        yield f"{what} in another order: {' | '.join(korean)}"


def differences(english_text: str, korean_text: str) -> list[str]:
    found = []
    for english, korean in pairs(sections(english_text), sections(korean_text)):
        if english is None or korean is None:
            found.append(f"only in {KOREAN}: {korean.name}" if korean else f"only in {ENGLISH}: {english.name if english else ''}")
            continue
        mine = [
            *compared("blocks", english.blocks, korean.blocks),
            *compared("lines of code", english.code, korean.code),
            *compared("code in the text", english.names, korean.names, ordered=False),
            *compared("links", *([link for link in of.links if link not in (ENGLISH, KOREAN)] for of in (english, korean))),
        ]
        if missing := Counter(english.numbers) - Counter(korean.numbers):
            mine.append(f"numbers only in {ENGLISH}: {' | '.join(missing.elements())}")
        found += [f"{english.name}, {korean.name}: {line}" for line in mine]
    return found


def test_the_korean_readme_follows_the_english_one():
    found = differences(read(ENGLISH), read(KOREAN))
    assert not found, "\n".join([f"{KOREAN} does not follow {ENGLISH}; mend there, in Korean, what changed in these sections:", *found])


@pytest.mark.parametrize(("file", "other"), [(ENGLISH, KOREAN), (KOREAN, ENGLISH)])
def test_each_begins_with_a_link_to_the_other(file, other):
    assert sections(read(file))[0].links[0] == other


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("## B\n", "## B\n\nMore.\n", "## B (line 7), ## 나 (line 7): blocks only in README.md: p"),
        ("## B\n", "### B\n", "### B (line 7), ## 나 (line 7): blocks only in README.md: h3"),
        ("## B\n", "## New\n\n`new`\n\n## B\n", "only in README.md: ## New (line 7)"),
        ("run --all\n", "run --some\n", "## B (line 7), ## 나 (line 7): lines of code only in README.md: run --some"),
        ("```sh", "```bash", "## B (line 7), ## 나 (line 7): lines of code only in README.md: ```bash"),
        ("`a.b`", "`a.c`", "# A (line 1), # 가 (line 1): code in the text only in README.md: `a.c`"),
        ("[one](1.md) [two](2.md)", "[two](2.md) [one](1.md)", "# A (line 1), # 가 (line 1): links in another order: 1.md | 2.md | p.png"),
        ("(p.png)", "(q.png)", "# A (line 1), # 가 (line 1): links only in README.md: q.png"),
        ("| 1.5 s |", "| 1.6 s |", "## B (line 7), ## 나 (line 7): numbers only in README.md: 1.6"),
        ("| 1.5 s |", "| 1.5 s |\n| x |", "## B (line 7), ## 나 (line 7): blocks only in README.md: tr | td"),
    ],
)
def test_a_difference_is_named_with_its_section(before, after, says):
    english = "# A\n\n`a.b` in two, [one](1.md) [two](2.md)\n\n![p](p.png)\n\n## B\n\n```sh\nrun --all\n```\n\n| t |\n|---|\n| 1.5 s |\n"
    korean = (
        "# 가\n\n2에서 `a.b`, [하나](1.md) [둘](2.md)\n\n![그림](p.png)\n\n## 나\n\n```sh\nrun --all\n```\n\n| 시간 |\n|---|\n| 1.5초 |\n"
    )
    assert differences(english, korean) == []
    assert english.count(before) == 1
    found = differences(english.replace(before, after), korean)
    assert says in found
