"""From a source of conversations to two files that training can rely on, and a report of what was done.

Knows the order of the steps and where results lie. Does not know how a step works.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.home import home_folder, new_folder, write_text, writing
from configs.errors import DataError
from configs.schema import ChatbotConfig, DataConfig
from data.conversations import Conversation, Message, read_prepared, to_jsonl
from data.feedback import accepted_file
from data.formats import NO_SPLIT, BadRow, read_conversations
from data.sources import read_all, source_hashes
from data.split import SplitResult, split_conversations
from data.template import RefusedByTemplateError, TokenRow, fit, load_tokenizer, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_SHOWN_BAD = 20
SOURCE_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet", ".arrow"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
FORGOTTEN_FILE = "forgotten.json"
OUR_FILES = ("train.jsonl", "heldout.jsonl", "bad.jsonl", "report.json")
TokensKey = tuple[tuple[Message, ...], bool]
Tokens = dict[TokensKey, TokenRow]


@dataclass(frozen=True)
class Prepared:
    """Conversations ready for training, and what became of the source's rows.

    Counts of tokens are of the training rows, after `data.too_long` was applied.
    """

    folder: Path
    num_train: int
    num_heldout: int
    num_train_tokens: int
    num_loss_tokens: int
    num_dropped_too_long: int
    num_cut: int
    num_duplicates: int
    num_leaks: int
    num_bad: int
    longest_tokens: int
    most_loss_tokens: int
    fingerprint: str
    source_key: str = ""  # changes with the source, the settings and the tokenizer; empty for datasets, whose files are not at hand
    sources: dict[str, str] = field(default_factory=dict)  # each source with its hash, as DVC writes it
    scrubbed: dict[str, int] = field(default_factory=dict)  # how much personal data was taken out, by kind
    longest_source_tokens: int = 0  # before `data.too_long` was applied
    from_cache: bool = False

    @property
    def train_file(self) -> Path:
        """Conversations to train on, as `read_prepared` takes them."""
        return self.folder / "train.jsonl"

    @property
    def heldout_file(self) -> Path:
        """Conversations to measure on."""
        return self.folder / "heldout.jsonl"

    @property
    def left_out(self) -> str:
        """Say how many rows were left out for other reasons than their length, and why; empty where none was."""
        counts = {
            "duplicates": self.num_duplicates,
            "held out too": self.num_leaks,
            "bad": self.num_bad,
        }
        found = ", ".join(f"{count} {why}" for why, count in counts.items() if count)
        return f"; of the source: {found}" if found else ""

    def too_long(self, limit_tokens: int) -> str:
        """Warn of rows over `data.max_length_tokens`, and say what would keep them whole; empty where there are none."""
        num_long = self.num_dropped_too_long + self.num_cut
        if not num_long:
            return ""
        what_was_done = {"dropped": self.num_dropped_too_long, "cut": self.num_cut}
        told = " and ".join(f"{count} {word}" for word, count in what_was_done.items() if count)
        num_rows = self.num_train + self.num_heldout + self.num_dropped_too_long
        why = f"{num_long} of {num_rows} conversations are over data.max_length_tokens={limit_tokens}: {told}"
        return (
            f"{why}; the longest has {self.longest_source_tokens} tokens. To keep all: data.max_length_tokens={self.longest_source_tokens}"
        )

    def to_json(self) -> str:
        """Write the report; the folder is where the report lies."""
        return json.dumps({name: value for name, value in asdict(self).items() if name not in ("folder", "from_cache")}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, folder: Path, from_cache: bool = False) -> "Prepared":
        """Read a report that `to_json` made."""
        return cls(folder=folder, from_cache=from_cache, **json.loads(text))


@dataclass(frozen=True)
class Fitted:
    """Conversations of one split that fit, with their tokens."""

    conversations: list[Conversation]
    rows: list[TokenRow]
    num_dropped: int
    num_cut: int
    longest_source_tokens: int


def prepare(config: ChatbotConfig, model_folder: Path) -> Prepared:
    """Read, check, split and tokenise the config's conversations; write them to the home folder, whole or not at all.

    Raises:
        DataError: The source cannot be used; all bad rows are named at once.
        ModelError: The model has no usable chat template.
    """
    source_key = _source_key(config, model_folder)
    cached = _find_cached(config.name, source_key)
    if cached:
        return cached
    sources = source_hashes(config)
    result, scrubbed = read_all(config)  # before the tokenizer, whose library takes seconds to import
    tokenizer = load_tokenizer(model_folder)
    tokens, refused = _tokenize(result.conversations, tokenizer)
    bad = [*result.bad, *refused]
    if bad and not config.data.skip_bad:
        raise bad_rows_error(config.data, bad)
    usable = [conversation for conversation in result.conversations if _tokens_key(conversation) in tokens]
    if not usable:
        why = f"{len(bad)} bad rows, and no other"
        raise DataError(f"no conversations in {config.data.source}", why, "see the reasons with data.skip_bad=false")
    sides = split_conversations(usable, config.data)
    train, heldout = _fit(sides.train, tokens, config.data), _fit(sides.heldout, tokens, config.data)
    for name, fitted in (("to train on", train), ("held out", heldout)):
        if not fitted.rows:
            raise _all_too_long(config.data, name, fitted, tokens)
    prepared = replace(_report(config.name, source_key, sides, train, heldout, len(bad)), sources=sources, scrubbed=dict(scrubbed))
    _write(prepared, train.conversations, heldout.conversations, bad)
    return prepared


def copy_prepared(prepared: Prepared, out: Path) -> None:
    """Put the same files into a folder whose name does not change with its content.

    Raises:
        DataError: The folder holds something else.
        ClusterError: It is no folder, or cannot be written to.
    """
    with writing(out, "name another --out"):
        if out.exists() and any(file.name not in OUR_FILES for file in out.iterdir()):
            raise DataError(f"{out} holds other files too", "nothing was written", "name another --out")
        for name in OUR_FILES[:-1]:
            write_text(out / name, (prepared.folder / name).read_text(encoding="utf-8"))
        write_text(out / OUR_FILES[-1], replace(prepared, source_key="").to_json())  # the key changes with our code, the copy should not


def check_source(config: DataConfig) -> None:
    """Find out within milliseconds, before a model is fetched, whether the source can be read and its rows are good.

    Raises:
        DataError: As for `prepare`.
    """
    result = read_conversations(config)
    if result.bad and not config.skip_bad:
        raise bad_rows_error(config, result.bad)


def fingerprint(train: Sequence[Conversation], heldout: Sequence[Conversation]) -> str:
    """Return 16 hex digits that change with the content of either split, not with where it came from."""
    digest = hashlib.sha256()
    for side in (train, heldout):
        digest.update(to_jsonl(conversation.content() for conversation in side).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _tokenize(conversations: Iterable[Conversation], tokenizer: "PreTrainedTokenizerBase") -> tuple[Tokens, list[BadRow]]:
    """Return the tokens, and the conversations that the template refuses."""
    tokens: Tokens = {}
    refused = []
    for conversation in conversations:
        try:
            tokens[_tokens_key(conversation)] = tokenize(conversation, tokenizer)
        except RefusedByTemplateError as error:
            refused.append(BadRow(conversation.origin, error.what, json.dumps(conversation.to_row(), ensure_ascii=False)))
    return tokens, refused


def _tokens_key(conversation: Conversation) -> TokensKey:
    """Return what the tokens and their loss depend on."""
    return conversation.messages, conversation.only_last_answer


def _fit(conversations: list[Conversation], tokens: Tokens, config: DataConfig) -> Fitted:
    source = [tokens[_tokens_key(conversation)] for conversation in conversations]
    fitted, num_cut = fit(source, config)
    kept = [(conversation, row) for conversation, row in zip(conversations, fitted, strict=True) if row is not None]
    longest = max((len(row.input_ids) for row in source), default=0)
    return Fitted([conversation for conversation, _ in kept], [row for _, row in kept], len(fitted) - len(kept), num_cut, longest)


def _report(name: str, source_key: str, sides: SplitResult, train: Fitted, heldout: Fitted, num_bad: int) -> Prepared:
    print_of_content = fingerprint(train.conversations, heldout.conversations)
    return Prepared(
        folder=home_folder() / "data" / f"{name}-{print_of_content}",
        num_train=len(train.rows),
        num_heldout=len(heldout.rows),
        num_train_tokens=sum(len(row.input_ids) for row in train.rows),
        num_loss_tokens=sum(row.num_loss_tokens for row in train.rows),
        num_dropped_too_long=train.num_dropped + heldout.num_dropped,
        num_cut=train.num_cut + heldout.num_cut,
        num_duplicates=sides.num_duplicates,
        num_leaks=sides.num_leaks,
        num_bad=num_bad,
        longest_tokens=max(len(row.input_ids) for row in (*train.rows, *heldout.rows)),
        most_loss_tokens=max(row.num_loss_tokens for row in (*train.rows, *heldout.rows)),
        fingerprint=print_of_content,
        source_key=source_key,
        longest_source_tokens=max(train.longest_source_tokens, heldout.longest_source_tokens),
    )


def _write(prepared: Prepared, train: list[Conversation], heldout: list[Conversation], bad: list[BadRow]) -> None:
    """Write all files at once, or renew each where the folder of this content is there already."""
    texts = {
        "train.jsonl": to_jsonl(conversation.to_row() for conversation in train),
        "heldout.jsonl": to_jsonl(conversation.to_row() for conversation in heldout),
        "bad.jsonl": to_jsonl(asdict(row) for row in bad),
        "report.json": prepared.to_json(),
    }
    if prepared.folder.is_dir():
        (prepared.folder / FORGOTTEN_FILE).unlink(missing_ok=True)  # where the rows came back, the source still has them
        for name, text in texts.items():
            write_text(prepared.folder / name, text)
        return
    with new_folder(prepared.folder) as draft:
        for name, text in texts.items():
            write_text(draft / name, text)


def _source_key(config: ChatbotConfig, model_folder: Path) -> str:
    """Return a digest of all that the result depends on; empty where it is not at hand, as with a hub dataset."""
    source = Path(config.data.source).expanduser()
    files = sorted(file for file in source.rglob("*") if file.suffix in SOURCE_SUFFIXES) if source.is_dir() else [source]
    if not source.exists():
        return ""
    files += [accepted_file(config.name)] if config.data.feedback else []
    digest = hashlib.sha256(f"{config.data.model_dump_json()}\0{_code_digest()}".encode())
    for file in (*files, *(model_folder / name for name in TOKENIZER_FILES)):
        if file.is_file():
            digest.update(f"\0{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _code_digest() -> str:
    """Change with this folder's own code, so that a mended mask never hides behind an old result."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def _find_cached(name: str, source_key: str) -> Prepared | None:
    """Return an earlier result of the same source, settings and tokenizer, unless its files were changed."""
    for file in sorted((home_folder() / "data").glob(f"{name}-*/report.json")) if source_key else ():
        try:
            prepared = Prepared.from_json(file.read_text(encoding="utf-8"), file.parent, from_cache=True)
            if prepared.source_key == source_key:
                content = fingerprint(read_prepared(prepared.train_file), read_prepared(prepared.heldout_file))
                return prepared if content == prepared.fingerprint else None
        except (OSError, ValueError, TypeError, DataError):  # damaged, or of an older form: made anew
            continue
    return None


def bad_rows_error(config: DataConfig, bad: list[BadRow]) -> DataError:
    """Name the first bad rows with place and reason, and count the rest."""
    shown = [f"  {row.place}: {row.reason}" for row in bad[:NUM_SHOWN_BAD]]
    if len(bad) > NUM_SHOWN_BAD:
        shown.append(f"  and {len(bad) - NUM_SHOWN_BAD} more")
    count = "one bad row" if len(bad) == 1 else f"{len(bad)} bad rows"
    remedy = "mend them, or set them aside with data.skip_bad=true"
    if any(row.reason == NO_SPLIT for row in bad):
        remedy = "data.split=row holds out a share of the rows by itself; or mark each row's split as train or heldout"
    files = {row.place.rpartition(":")[0] for row in bad}  # the source's own, or that of the accepted feedback
    return DataError(f"{count} in {files.pop() if len(files) == 1 else config.source}", "\n".join(shown), remedy)


def _all_too_long(config: DataConfig, side: str, fitted: Fitted, tokens: Tokens) -> DataError:
    shortest = min(len(row.input_ids) for row in tokens.values())
    what_was_done = "dropped" if config.too_long == "drop" else "cut, which left no answer in them, and dropped"
    limit = f"the limit is {config.max_length_tokens} tokens, the shortest has {shortest}"
    why = f"{fitted.num_dropped} conversations were too long and {what_was_done}; {limit}"
    return DataError(f"nothing left {side}", why, f"data.max_length_tokens={max(2 * shortest, config.max_length_tokens)}")
