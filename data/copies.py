"""Prepared conversations where workers on any machine of a cluster find them: copies in its storage, by the name of their folder.

Knows the storage. Does not know what is in them. Without storage there are none, and all is on one machine.
"""

from pathlib import Path

from cluster.home import home_folder, new_folder
from cluster.storage import exists, get, put, remove
from configs.errors import DataError


def send_data(storage: str, folder: Path) -> None:
    """Lay prepared conversations where workers on other machines find them; their folder's name tells them from any others."""
    if storage:
        put(storage, folder, _place(folder.name))


def fetch_data(storage: str, name: str) -> Path:
    """Return this machine's copy of prepared conversations.

    Raises:
        DataError: They are not in the storage.
    """
    target = home_folder() / "data" / name
    if not target.is_dir():
        if not storage or not exists(storage, _place(name)):
            raise DataError(f"the data {name} is not on this machine", "and not in the cluster's storage", "storage=... at `up`")
        with new_folder(target) as draft:
            get(storage, _place(name), draft)
    return target


def has_copy(storage: str, name: str) -> bool:
    """Whether the storage has prepared conversations."""
    return bool(storage) and exists(storage, _place(name))


def drop_copy(storage: str, name: str) -> None:
    """Take prepared conversations out of the storage; whoever trains on them lays them there again."""
    remove(storage, _place(name))


def _place(name: str) -> str:
    return f"data/{name}"
