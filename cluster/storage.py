"""The place that every machine of a cluster reaches: a folder, or a URL that pyarrow knows; for data and checkpoints of runs.

Knows files, and pyarrow's file systems. Does not know what is kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import ClusterError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem  # type: ignore[import-untyped]

MARK = ".tandem-storage"


def mark(storage: str) -> None:
    """Leave a file in the storage, by which joined machines see that theirs is the same place.

    Raises:
        ClusterError: It cannot be written to.
    """
    files, root = _open(storage)
    try:
        files.create_dir(root, recursive=True)
        with files.open_output_stream(f"{root}/{MARK}") as stream:
            stream.write(b"Tandem keeps data and checkpoints of runs here.\n")
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"storage={storage} cannot be written to", str(error), "a folder or a bucket that this user may write to"
        ) from None


def reaches(storage: str) -> bool:
    """Whether this machine sees what the head left in the storage."""
    return exists(storage, MARK)


def exists(storage: str, name: str) -> bool:
    """Whether there is a file or folder of this name.

    Raises:
        ClusterError: The storage does not answer.
    """
    from pyarrow.fs import FileType

    files, root = _open(storage)
    with _answering(storage):
        return files.get_file_info(f"{root}/{name}").type is not FileType.NotFound


def has_any(storage: str, folder: str, beginning: str) -> bool:
    """Whether a folder in the storage has a folder whose name begins so."""
    from pyarrow.fs import FileSelector, FileType

    files, root = _open(storage)
    found = files.get_file_info(FileSelector(f"{root}/{folder}", allow_not_found=True))
    return any(entry.type is FileType.Directory and entry.base_name.startswith(beginning) for entry in found)


def put(storage: str, source: Path, name: str) -> None:
    """Copy a folder into the storage, whole or not at all; one that is there already stays.

    Raises:
        ClusterError: The storage does not answer, or does not take it.
    """
    from pyarrow.fs import LocalFileSystem, copy_files

    if exists(storage, f"{name}/{MARK}"):
        return
    files, root = _open(storage)
    with _answering(storage):
        files.create_dir(f"{root}/{name}", recursive=True)
        copy_files(str(source), f"{root}/{name}", source_filesystem=LocalFileSystem(), destination_filesystem=files)
        with files.open_output_stream(f"{root}/{name}/{MARK}") as stream:  # last: without it, a copy that was cut off is made again
            stream.write(b"")


def get(storage: str, name: str, target: Path) -> None:
    """Copy a folder out of the storage into an empty one."""
    from pyarrow.fs import LocalFileSystem, copy_files

    files, root = _open(storage)
    copy_files(f"{root}/{name}", str(target), source_filesystem=files, destination_filesystem=LocalFileSystem())


def remove(storage: str, name: str) -> None:
    """Take a folder out of the storage.

    Raises:
        ClusterError: The storage does not answer.
    """
    files, root = _open(storage)
    with _answering(storage):
        if exists(storage, f"{name}/{MARK}"):
            files.delete_file(f"{root}/{name}/{MARK}")  # first: what is cut off here is no whole copy
        files.delete_dir(f"{root}/{name}")


def is_folder(storage: str) -> bool:
    """Whether the storage is a folder, and no URL."""
    return "://" not in storage


@contextmanager
def _answering(storage: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ClusterError(f"{storage} does not answer", str(error), "its address, and its credentials in the environment") from None


def _open(storage: str) -> "tuple[FileSystem, str]":
    from pyarrow.fs import FileSystem

    try:
        files, root = FileSystem.from_uri(storage if not is_folder(storage) else Path(storage).as_uri())
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"storage={storage} is no place that pyarrow knows", str(error), "a folder, or a URL such as s3://bucket/tandem"
        ) from None
    return files, str(root).rstrip("/")
