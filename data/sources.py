"""What a chatbot's rows are read from, its own source and accepted feedback; and the version of it, named as DVC names it.

Knows DVC's hash and its lock file, but does not need DVC. Does not know what rows are prepared for.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from configs.schema import ChatbotConfig
from data.conversations import Conversation, Message, answer_is_right
from data.feedback import accepted_file
from data.formats import ReadResult, read_conversations
from data.scrub import Scrubbed, Scrubber

PIECE_BYTES = 2**20
FEEDBACK_SOURCE = "accepted feedback"


def read_all(config: ChatbotConfig) -> tuple[ReadResult, Counter[str]]:
    """Read the chatbot's source and its accepted feedback, scrubbed where the config wants it; also count what was taken out."""
    result, scrubbed = read_conversations(config.data), Counter[str]()
    if config.data.scrub:
        result, scrubbed = _scrub(result, Scrubber(config.data.scrub_keep), config.data.system_prompt)
    if config.data.feedback and (rows := accepted_file(config.name)).is_file() and rows.stat().st_size:
        more = read_conversations(config.data.model_copy(update={"source": str(rows), "format": "chat"}))
        result = ReadResult([*result.conversations, *more.conversations], [*result.bad, *more.bad])
    return result, scrubbed


def _scrub(result: ReadResult, scrubber: Scrubber, own_prompt: str | None) -> tuple[ReadResult, Counter[str]]:
    """Scrub every row but the config's own system prompt, which is trained on as it is served."""
    counts: Counter[str] = Counter()

    def scrub(row: Conversation) -> Conversation:
        texts = [
            Scrubbed(message.content) if message == Message("system", own_prompt or "") else scrubber.scrub(message.content)
            for message in row.messages
        ]
        for text in texts:
            counts.update(text.counts)
        messages = tuple(replace(message, content=text.text) for message, text in zip(row.messages, texts, strict=True))
        # A group may be named after a person too; all that it is for is to be told from others.
        group = row.group and hashlib.sha256(row.group.encode()).hexdigest()[:16]
        return replace(row, messages=messages, group=group, keys=_scrub_keys(row, texts, scrubber))

    return ReadResult([scrub(row) for row in result.conversations], [replace(row, raw="") for row in result.bad]), counts


def _scrub_keys(row: Conversation, texts: list[Scrubbed], scrubber: Scrubber) -> tuple[str, ...]:
    """Return a row's keys with the placeholders that its answer has got, without those that ask for what is no longer there."""
    taken = sorted(((words, kind) for text in texts for words, kind in text.taken.items()), key=lambda pair: -len(pair[0]))
    kept = []
    for key in row.keys:
        if not answer_is_right(row.messages[-1].content, [key]):  # it is not about this answer's words
            kept += [] if scrubber.scrub(key).counts else [key]
            continue
        clean = key
        for words, kind in taken:
            for written in (words, re.escape(words)):  # a key may be a regular expression
                clean = re.sub(rf"(?<!\w){re.escape(written)}(?!\w)", kind, clean, flags=re.IGNORECASE)
        with suppress(re.error):
            kept += [clean] if answer_is_right(texts[-1].text, [clean]) else []
    return tuple(kept)


def source_hashes(config: ChatbotConfig) -> dict[str, str]:
    """Return the hash of the source, and of the accepted feedback if there is any, as DVC names them; none of a hub dataset."""
    source, accepted = Path(config.data.source).expanduser(), accepted_file(config.name)
    hashes = {config.data.source: dvc_hash(source)} if source.exists() else {}
    if config.data.feedback and accepted.is_file() and accepted.stat().st_size:
        hashes[FEEDBACK_SOURCE] = dvc_hash(accepted)
    return hashes


def dvc_hash(path: Path) -> str:
    """Return the MD5 of a file, or of a folder's listing, as `dvc.lock` and `.dvc` files have it."""
    if path.is_file():
        return _md5(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listing = [{"md5": _md5(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    text = json.dumps(sorted(listing, key=lambda entry: entry["relpath"]), sort_keys=True)
    return f"{hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()}.dir"


def known_to_dvc(root: Path, wanted: str) -> list[str]:
    """Return the paths that `dvc.lock` or a `.dvc` file beside the data holds with this hash."""
    return sorted({path for path, found in _recorded(root) if found == wanted})


def _recorded(root: Path) -> Iterator[tuple[str, str]]:
    lock = _load(root / "dvc.lock")
    for stage in (lock.get("stages") or {}).values():
        for entry in (*stage.get("deps", []), *stage.get("outs", [])):
            yield entry["path"], entry.get("md5", "")
    for file in (*root.glob("*.dvc"), *root.glob("data/**/*.dvc")):
        for entry in _load(file).get("outs", []) if file.is_file() else ():
            yield (file.parent.relative_to(root) / entry["path"]).as_posix(), entry.get("md5", "")


def _load(file: Path) -> dict[str, Any]:
    loaded = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    return loaded if isinstance(loaded, dict) else {}


def _md5(file: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("rb") as stream:
        while piece := stream.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
