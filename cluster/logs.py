"""The four streams of the log: one JSON event a line, in files that all processes of this machine share, and on standard output.

Secrets, keys and prompts are taken out on the way: by the names of fields, by their shape, and those of this machine's environment by
what they are. Knows structlog. Does not know what is logged.
"""

import json
import logging
import math
import os
import re
import stat
import sys
import traceback
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import structlog
from pydantic import SecretStr

from cluster.home import BYTES_PER_MIB, log_folder
from cluster.session import LOGS_VARIABLE, token_file
from cluster.shared_file import SharedFile
from configs.schema import Environment, LogConfig

TRAINING, INFERENCE, SYSTEM, API = STREAMS = ("training", "inference", "system", "api")
CONTENT_STREAMS = (INFERENCE, API)  # where an error's message may quote what a person wrote
REDACTED = "[redacted]"
MIN_SECRET_LETTERS = 8
NUM_EVENT_LETTERS = 12
CONTENT = frozenset({"prompt", "messages", "content", "text", "input", "system", "answer", "comment", "better_answer"})
SECRET_NAME = re.compile(r"authorization|api[-_]?key|password|secret|cookie|credential|(^|_)token$", re.IGNORECASE)
# How secrets look, by a part that all of a kind have: only where it stands in a line is there more to look for, which takes longer.
SHAPES = {
    "sk-": r"sk-[\w-]{12,}",
    "hf_": r"hf_\w{12,}",
    "gh": r"gh[a-z]_\w{12,}",
    "earer ": r"(?<=earer )[\w.~+/=-]+",
    "://": r"(?<=://)[^\s\"/@:]*:[^\s\"/@]+(?=@)",  # to the first colon alone: a prompt of many would take hours
}

FIELDS = "fields"  # of what is logged by `logging`: log.info("words", extra={"fields": {"name": value}})
FIRST = ("timestamp", "level", "stream", "event")
PLAIN = frozenset({str, int, bool, type(None)})
ENCODER = json.JSONEncoder(default=str)  # in ASCII: what other alphabets take for the end of a line, or for half a letter, is written out

Event = MutableMapping[str, Any]
Logger = Any  # a structlog logger: info("event", field=value), bind(field=value)


class Streams:
    """The four streams of one folder, for one process."""

    def __init__(self, folder: Path, config: LogConfig) -> None:
        self.config = config
        self.echo: TextIO | None = None
        self._files = {
            name: SharedFile(stream_file(folder, name), config.max_file_mib * BYTES_PER_MIB, config.num_files_kept) for name in STREAMS
        }
        own = {secret: re.escape(secret) for secret in sorted(map(_as_written, _own_secrets()), key=len, reverse=True)}
        self._shapes = {mark: re.compile(shape) for mark, shape in {**own, **SHAPES}.items()}

    def logger(self, stream: str) -> Logger:
        """Return the logger of a stream; it costs microseconds a line, and never fails."""

        def write(_: Any, __: str, event: Event) -> str:
            return self._line(self._with_exception(event, stream))

        processors: list[Any] = [structlog.processors.MaybeTimeStamper(fmt="iso", utc=True), structlog.processors.add_log_level, write]
        level = structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[self.config.level.upper()])
        pen = _Pen(self, self._files[stream])
        return structlog.wrap_logger(pen, processors=processors, wrapper_class=level, stream=stream, pid=os.getpid()).bind()

    def _with_exception(self, event: Event, stream: str) -> Event:
        found = event.pop("exc_info", None)
        error = sys.exc_info()[1] if found is True else found[1] if isinstance(found, tuple) else found
        if isinstance(error, BaseException):
            event["exception"] = _told(error, self.config.prompts or stream not in CONTENT_STREAMS)
        return event

    def _line(self, event: Event) -> str:
        """Write an event as one line; what has the shape of a secret is taken out of all of it, wherever it stands."""
        shown = {name: event[name] for name in FIRST}
        for name, value in event.items():  # most are plain, and two lines a request are written in the loop that answers
            is_plain = type(value) in PLAIN and not _is_secret(name) and name not in CONTENT
            shown[name] = value if is_plain else self._shown(name, value)
        line = ENCODER.encode(shown)
        for mark, shape in self._shapes.items():
            if mark in line:
                line = shape.sub(REDACTED, line)
        return line

    def _shown(self, name: str, value: Any) -> Any:
        if _is_secret(name) or (name in CONTENT and not self.config.prompts):
            return REDACTED
        if isinstance(value, str):
            return value
        if isinstance(value, dict):
            return {str(inner): self._shown(str(inner), part) for inner, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._shown("", part) for part in value]
        return value if not isinstance(value, float) or math.isfinite(value) else str(value)  # JSON knows no NaN


class _Pen:
    """What structlog hands its lines to."""

    def __init__(self, streams: Streams, file: SharedFile) -> None:
        self.streams, self.file = streams, file

    def debug(self, line: str) -> None:
        self.file.write(line.encode() + b"\n")
        if echo := self.streams.echo:
            with suppress(OSError, ValueError):
                echo.write((paint(line) if echo.isatty() else line) + "\n")
                echo.flush()

    info = warning = error = critical = debug


class _Bridge(logging.Handler):
    """Sends what is logged by `logging.getLogger("tandem.STREAM")` to that stream, and by any other name to `system`."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.loggers = {name: streams.logger(name) for name in STREAMS}

    def emit(self, record: logging.LogRecord) -> None:
        _, _, name = record.name.partition(".")
        logger = self.loggers.get(name) or self.loggers[SYSTEM].bind(source=name)
        fields = {"exc_info": record.exc_info} if record.exc_info else {}
        try:
            logger.log(record.levelno, record.getMessage(), **fields, **getattr(record, FIELDS, {}))
        except Exception:  # of a line that is wrongly made, as every handler of `logging` has it
            self.handleError(record)


def set_up() -> None:
    """Send to the streams what this process logs by `logging` too, and show its events on standard output, where that is no file.

    For processes of the cluster. A command tells people what it does in words of its own, and only writes to the files.
    """
    ours = streams()
    output = sys.__stdout__  # the process's own: Ray Serve may have put a slow one in its place
    ours.echo = output if output and not _is_a_file(output) else None
    root = logging.getLogger("tandem")
    root.handlers = [_Bridge(ours)]
    root.setLevel(ours.config.level.upper())


def streams() -> Streams:
    """Return this process's streams."""
    return _streams(log_folder())


@lru_cache(maxsize=1)
def _streams(folder: Path) -> Streams:
    return Streams(folder, LogConfig.model_validate_json(os.environ.get(LOGS_VARIABLE) or "{}"))


def stream_file(folder: Path, stream: str) -> Path:
    """Return the file of a stream."""
    return folder / f"{stream}.jsonl"


def paint(line: str) -> str:
    """Return a line as people read it, in colour; one that was torn, as by a full disk, as it is."""
    try:
        told = dict(json.loads(line))
    except (ValueError, TypeError):
        return _printable(line.rstrip("\n"))
    event = {name: _printable(value) if isinstance(value, str) else value for name, value in told.items() if name != "pid"}
    return str(_painter()(None, event.get("level", ""), event))


@lru_cache(maxsize=1)
def _painter() -> structlog.dev.ConsoleRenderer:
    return structlog.dev.ConsoleRenderer(colors=True, sort_keys=False, pad_event_to=NUM_EVENT_LETTERS, pad_level=False)


def _printable(text: str) -> str:
    """Keep what others wrote from moving the cursor."""
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)


def _told(error: BaseException, with_message: bool) -> str:
    """Tell of an error and of those that it came from; without their messages where these may quote what people wrote."""
    words = "".join(traceback.format_tb(error.__traceback__)) + type(error).__name__ + (f": {error}" if with_message else "")
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return f"{_told(earlier, with_message)}\n{words}" if earlier else words


def _own_secrets() -> Iterator[str]:
    """Yield the secrets of this machine's environment, and the cluster's token."""
    environment = Environment()
    for name in type(environment).model_fields:
        if isinstance(value := getattr(environment, name), SecretStr) and len(value) >= MIN_SECRET_LETTERS:
            yield value.get_secret_value()
    with suppress(OSError):
        if token := token_file().read_text().strip():
            yield token


def _as_written(secret: str) -> str:
    """Return how a secret stands in a line."""
    return ENCODER.encode(secret)[1:-1]


@lru_cache(maxsize=1024)
def _is_secret(name: str) -> bool:
    """Whether a field of this name holds a secret."""
    return bool(SECRET_NAME.search(name))


def _is_a_file(output: TextIO) -> bool:
    """Whether a process's output is a file: so it is for what `up` and Ray start, and a second copy on the same disk helps nobody."""
    try:
        return stat.S_ISREG(os.fstat(output.fileno()).st_mode)
    except (OSError, ValueError):
        return False
