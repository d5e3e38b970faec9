"""Whether files have what they must not have."""

from collections.abc import Iterable, Mapping
from pathlib import Path


def files_in(folders: Iterable[Path]) -> list[Path]:
    """All files of some folders and of those below."""
    return [file for folder in folders for file in folder.rglob("*") if file.is_file()]


def leaks(files: Iterable[Path], planted: Mapping[str, str]) -> list[tuple[str, str]]:
    """What of the words that were planted is found, by what they are called, and the file that has them."""
    return [(what, file.name) for file in files for what in _found(_read(file), planted)]


def _read(file: Path) -> bytes:
    """Return what a file holds; one that was put aside meanwhile is looked at by its other name, or is gone."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""


def _found(text: bytes, planted: Mapping[str, str]) -> list[str]:
    return [what for what, words in planted.items() if words.encode() in text]
