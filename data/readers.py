"""Reads files, folders and Hugging Face datasets into raw rows, each with its place.

Knows JSON, CSV, Parquet and the `datasets` library. Does not know what a conversation is.
"""

import csv
import difflib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import DataError
from configs.schema import Environment

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_TIMEOUT_S = 10
SHOWN_SUFFIXES = ".jsonl, .json, .csv, .parquet"


@dataclass(frozen=True)
class RawRow:
    """One row as it was found; without `fields` it could not be read, for `reason`."""

    place: str
    raw: str
    fields: dict[str, Any] | None
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of one file, or of one split of a dataset; all of one shape."""

    name: str
    rows: list[RawRow]
    split: str | None = None  # the dataset's own name for it, such as `test`


def read_tables(source: str) -> list[Table]:
    """Read every row of a file, a folder, or a Hugging Face dataset.

    Raises:
        DataError: The source is missing, empty, out of reach, or of an unknown kind.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.is_file():
            return [_read_file(path)]
    except OSError as error:
        raise DataError(f"cannot read {source}", f"{type(error).__name__}: {error}", "make it readable") from None
    # `data/chats.jsonl` has the form of a hub id too: a known suffix, or a folder that is there, means a file.
    if HUB_ID.fullmatch(source) and path.suffix not in READERS and not path.parent.is_dir():
        return _read_hub(source)
    raise DataError(f"no file {source}", f"looked in {path.parent.resolve()}", _nearby(path))


def _nearby(path: Path) -> str:
    """Name the file beside `path` whose name is most like it."""
    known = [file.name for file in path.parent.glob("*") if file.suffix in READERS] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, known, n=1)
    return f"data.source={path.parent / near[0]}" if near else "set data.source to a file, a folder, or a dataset id (owner/name)"


def _read_folder(folder: Path) -> list[Table]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _read_saved(folder)
    files = sorted(file for file in folder.iterdir() if file.suffix in READERS and file.is_file() and not file.name.startswith("."))
    if not files:
        remedy = f"put in files ending in {SHOWN_SUFFIXES}"
        raise DataError(f"no conversations in the folder {folder}", "it has no file of a known kind", remedy)
    return [_read_file(file) for file in files]


def _read_file(file: Path) -> Table:
    reader = READERS.get(file.suffix)
    if reader is None:
        raise DataError(f"{file} is of an unknown kind", f"known endings: {SHOWN_SUFFIXES}", "convert or rename it")
    rows = list(reader(file))
    if not rows:
        raise DataError(f"{file} is empty", "it has no rows", "put one conversation on each line")
    return Table(str(file), rows)


def _read_text(file: Path) -> str:
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        why = f"byte 0x{content[error.start]:02x} cannot stand there ({error.reason})"
        raise DataError(f"{file}:{line} is not UTF-8", why, f"iconv -f ITS-ENCODING -t UTF-8 {file} > new-file") from None


def _read_json(file: Path) -> Iterator[RawRow]:
    """Read one object a line, or one array of objects."""
    text = _read_text(file)
    if text.lstrip().startswith("[") and (file.suffix == ".json" or not _is_json(text.lstrip().partition("\n")[0])):
        yield from _read_array(file, text)
        return
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _json_row(f"{file}:{number}", line.strip())


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_row(place: str, text: str) -> RawRow:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return RawRow(place, text, None, f"not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; a nest thousands deep
        return RawRow(place, text, None, f"not JSON ({type(error).__name__})")
    return _object_row(place, text, value)


def _object_row(place: str, raw: str, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(place, raw, value)
    return RawRow(place, raw, None, f"not an object with fields but a {type(value).__name__}")


def _read_array(file: Path, text: str) -> Iterator[RawRow]:
    """Walk through an array value by value, to know the line of each."""
    decoder, blank = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    at = _skip(blank, text, text.index("[") + 1)
    line, counted = 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}:{line} is not JSON", str(error), "mend the row, or write one object a line (.jsonl)") from None
        yield _object_row(f"{file}:{line}", text[at:end], value)
        at = _skip(blank, text, end)
        if text[at : at + 1] == ",":
            at = _skip(blank, text, at + 1)
        elif text[at : at + 1] != "]":
            line = text.count("\n", 0, at) + 1
            raise DataError(f"{file}:{line} is not JSON", "the array is not closed, or a comma is missing", "mend the row")


def _skip(blank: re.Pattern[str], text: str, at: int) -> int:
    found = blank.match(text, at)
    return found.end() if found else at


def _read_csv(file: Path) -> Iterator[RawRow]:
    """Read a CSV with a header; a row's line is its first, also where quoted fields hold line breaks."""
    csv.field_size_limit(sys.maxsize)  # the default refuses a cell of 131,072 characters
    reader = csv.reader(io.StringIO(_read_text(file), newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            place, line = f"{file}:{line}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = [cell.strip().lower() for cell in cells]
            elif len(cells) == len(header):
                fields: dict[str, Any] = dict(zip(header, cells, strict=True))
                yield RawRow(place, json.dumps(fields, ensure_ascii=False), fields)
            else:
                reason = f"has {len(cells)} cells, but the header has {len(header)}"
                yield RawRow(place, json.dumps(cells, ensure_ascii=False), None, reason)
    except csv.Error as error:
        raise DataError(f"{file}:{line} is not CSV", str(error), 'close every quote, and write " inside a quoted cell as ""') from None


def _read_parquet(file: Path) -> Iterator[RawRow]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        values = pq.read_table(file).to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"{file} is not Parquet", str(error), "write the file again") from None
    yield from _number_rows(str(file), values)


def _number_rows(name: str, values: list[dict[str, Any]]) -> Iterator[RawRow]:
    for number, fields in enumerate(values, start=1):
        yield RawRow(f"{name}:{number}", json.dumps(fields, ensure_ascii=False, default=str), fields)


def _read_saved(folder: Path) -> list[Table]:
    import datasets

    try:
        return _dataset_tables(str(folder), datasets.load_from_disk(str(folder)))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the saved dataset {folder}", str(error), "save it again with datasets' save_to_disk") from None


def _read_hub(name: str) -> list[Table]:
    """Load a dataset from the hub; ask first whether it can be had, because `datasets` alone tries for half a minute."""
    secret = Environment().huggingface_token
    token = secret.get_secret_value() if secret else None
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("", "0", "false", "no"):
        _ask_hub(name, token)
    import datasets

    try:
        return _dataset_tables(name, datasets.load_dataset(name, token=token))
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DataError(f"cannot load the dataset {name}", str(error), f"look at https://huggingface.co/datasets/{name}") from None


def _ask_hub(name: str, token: str | None) -> None:
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    page = f"https://huggingface.co/datasets/{name}"
    try:
        HfApi(token=token).dataset_info(name, timeout=HUB_TIMEOUT_S)
    except GatedRepoError:
        remedy = f"accept its terms at {page}, then set HUGGINGFACE_TOKEN in .env"
        raise DataError(f"the dataset {name} is gated", "the hub wants a token that may read it", remedy) from None
    except (RepositoryNotFoundError, HFValidationError):
        why = "no file or folder of this name, and the hub has none that you may see"
        raise DataError(f"no dataset {name!r}", why, "check data.source; a private dataset needs HUGGINGFACE_TOKEN") from None
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        remedy = "check the network; set HF_HUB_OFFLINE=1 to take the copy in datasets' cache; or set data.source to a local file"
        why = f"no file or folder of this name, and the hub did not answer ({type(error).__name__})"
        raise DataError(f"cannot reach the dataset {name!r}", why, remedy) from None


def _dataset_tables(name: str, dataset: Any) -> list[Table]:
    """Make one table of each split; a dataset without splits is one table."""
    splits = dict(dataset.items()) if hasattr(dataset, "items") else {None: dataset}
    tables = []
    for split, part in splits.items():
        table_name = f"{name}/{split}" if split else name
        tables.append(Table(table_name, list(_number_rows(table_name, part.to_list())), split))
    if not any(table.rows for table in tables):
        raise DataError(f"the dataset {name} is empty", "it has no rows", "choose another data.source")
    return [table for table in tables if table.rows]


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
