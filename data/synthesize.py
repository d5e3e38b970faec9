"""Makes more conversations from seed facts: the same answers, asked for in other words.

Knows facts (rows of one group) and what must not leak into training. Does not know how a question is reworded.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.home import write_text, writing
from configs.cli import console
from configs.errors import DataError
from configs.schema import ChatbotConfig
from data.conversations import Conversation, to_jsonl
from data.formats import read_conversations
from data.prepare import bad_rows_error
from data.reword import NEAR_DUPLICATE, NEAR_LEAK, connect, is_near_any, reword_by_model, reword_by_templates
from data.split import split_conversations

Reword = Callable[[str, int], list[str]]  # question, how many


@dataclass(frozen=True)
class Options:
    """What to make, and with whose help."""

    out: Path
    num_per_fact: int = 8
    endpoint: str = "http://127.0.0.1:8000/v1"
    model: str = ""
    templates: bool = False
    force: bool = False


@dataclass
class Tally:
    """What was made, and what was left out."""

    num_new: int = 0
    num_near_duplicates: int = 0
    num_leaks: int = 0
    by_model: int = 0
    facts_short: list[str] = field(default_factory=list)


def synthesize(config: ChatbotConfig, options: Options) -> Tally:
    """Write the seed conversations, the held-out ones, and `num_per_fact` new ones for each fact, all marked, to `options.out`.

    Raises:
        DataError: The seeds cannot be used, the endpoint refuses us, or `options.out` is there already.
        ClusterError: `options.out` cannot be written.
    """
    if options.out.is_dir():
        raise DataError(f"{options.out} is a folder", "nothing was written", f"--out {options.out / 'chats.jsonl'}")
    if options.out.exists() and not options.force:
        raise DataError(f"{options.out} is there already", "nothing was written", "--force replaces it; or name another --out")
    with writing(options.out, "name another --out"):  # before a model is asked for hours
        options.out.parent.mkdir(parents=True, exist_ok=True)
    # The config's system prompt is added when the new file is read, so it must not be written into it.
    result = read_conversations(config.data.model_copy(update={"system_prompt": None}))
    if result.bad and not config.data.skip_bad:
        raise bad_rows_error(config.data, result.bad)
    sides = split_conversations(result.conversations, config.data)
    reword = _Reworder(config, options)
    tally = Tally()
    rows = [conversation.to_row() for conversation in sides.train]
    heldout = [_question(conversation) for conversation in sides.heldout]
    for group, seeds in _progress(_facts(sides.train), options):
        rows += _multiply(group, seeds, heldout, reword, options.num_per_fact, tally)
    rows += [conversation.to_row() for conversation in sides.heldout]
    with writing(options.out):
        write_text(options.out, to_jsonl(_told(row) for row in rows))
    _say(tally, options, len(rows))
    return tally


class _Reworder:
    """Rewords by the endpoint while it answers, and by templates otherwise; says so once."""

    def __init__(self, config: ChatbotConfig, options: Options) -> None:
        """Ask once whether the endpoint is there."""
        # The base model is asked first: a chatbot that was trained to answer questions will answer them.
        self.seed, self.endpoint = config.data.split_seed, options.endpoint
        self.connected = None if options.templates else connect(options.endpoint, options.model, [config.model.name, config.name])
        if not options.templates and self.connected is None:
            self._fall_back("cannot be reached")

    def __call__(self, question: str, count: int) -> tuple[list[str], str]:
        """Return wordings, and who made them."""
        if self.connected:
            wordings = reword_by_model(*self.connected, question, count, self.seed)
            if wordings is not None:
                return wordings, self.connected[1]
            self.connected = None
            self._fall_back("does not answer any more")
        return reword_by_templates(question), "templates"

    def _fall_back(self, reason: str) -> None:
        console.print(f"[yellow]notice[/]  {self.endpoint} {reason}: from here on, fixed English templates reword the questions")


def _told(row: dict[str, Any]) -> dict[str, Any]:
    """Return what of a row a file of conversations holds; `synthetic` marks those that no person wrote."""
    return {name: value for name, value in row.items() if name not in ("origin", "feedback") and (name, value) != ("synthetic", None)}


def _facts(train: list[Conversation]) -> dict[str, list[Conversation]]:
    """Return the seeds of each fact; a conversation without a group is a fact of its own."""
    facts: dict[str, list[Conversation]] = {}
    for conversation in train:
        facts.setdefault(conversation.group or f"from {conversation.origin}", []).append(conversation)
    return facts


def _multiply(
    group: str, seeds: list[Conversation], heldout: list[str], reword: _Reworder, num_wanted: int, tally: Tally
) -> list[dict[str, Any]]:
    """Make new conversations of one fact, taking its seeds in turn so that all its answers are used."""
    taken = [_question(seed) for seed in seeds]
    rows: list[dict[str, Any]] = []
    sources = [(seed, iter(wordings), by) for seed in seeds for wordings, by in [reword(_question(seed), num_wanted)]]
    for seed, wording, by in _take_turns(sources):
        if len(rows) == num_wanted:
            break
        if is_near_any(wording, heldout, NEAR_LEAK):
            tally.num_leaks += 1
        elif is_near_any(wording, taken, NEAR_DUPLICATE):
            tally.num_near_duplicates += 1
        else:
            taken.append(wording)
            rows.append(_new_row(seed, wording, by))
            tally.by_model += by != "templates"
    tally.num_new += len(rows)
    if len(rows) < num_wanted:
        tally.facts_short.append(group)
    return rows


def _take_turns(sources: list[tuple[Conversation, Iterator[str], str]]) -> Iterator[tuple[Conversation, str, str]]:
    """Yield one wording of each seed, then the next of each, until all are used up."""
    while sources:
        left = []
        for seed, wordings, by in sources:
            for wording in islice(wordings, 1):
                left.append((seed, wordings, by))
                yield seed, wording, by
        sources = left


def _question(conversation: Conversation) -> str:
    """Return the last thing that the user said."""
    return next(message.content for message in reversed(conversation.messages) if message.role == "user")


def _new_row(seed: Conversation, wording: str, by: str) -> dict[str, Any]:
    row = seed.to_row()
    last = max(index for index, message in enumerate(seed.messages) if message.role == "user")
    row["messages"][last]["content"] = wording
    return {**row, "split": "train", "synthetic": by}


def _progress(facts: dict[str, list[Conversation]], options: Options) -> Iterator[tuple[str, list[Conversation]]]:
    """Show how far it is, on a terminal and where a model is asked."""
    from rich.progress import track

    yield from track(list(facts.items()), "rewording", console=console, transient=True, disable=options.templates)


def _say(tally: Tally, options: Options, num_rows: int) -> None:
    makers = f"{tally.by_model} by a model, {tally.num_new - tally.by_model} by templates"
    console.print(f"[green]ok[/]  {options.out}: {num_rows} conversations, {tally.num_new} of them new ({makers})")
    console.print(f"    left out: {tally.num_near_duplicates} near duplicates, {tally.num_leaks} too near to a held-out wording")
    if tally.facts_short:
        shown = ", ".join(tally.facts_short[:5])
        console.print(f"    fewer than {options.num_per_fact} for {len(tally.facts_short)} facts, such as {shown}", markup=False)
    console.print(f"    train on it: data.source={options.out} data.split=marked")
