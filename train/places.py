"""Where runs keep the checkpoints that workers on any machine must reach: in the cluster's storage, or else in the home folder.

Knows the storage and Ray's checkpoints. Does not know what is in them.
"""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.home import home_folder
from cluster.storage import has_any

FETCHED_KEPT_S = 24 * 3600.0  # whoever fetches a checkpoint has registered it, or failed, within minutes


def runs_place(storage: str, kind: str = "runs") -> str:
    """Return the folder or URL under which runs, or sweeps, are kept by their ids."""
    return f"{storage.rstrip('/')}/{kind}" if storage else str(home_folder() / kind)


def has_checkpoint(storage: str, run_id: str) -> bool:
    """Whether a run saved anything; it may have where the storage does not answer, which is no reason to hide why the run failed."""
    try:
        return has_any(runs_place(storage), run_id, "checkpoint_")
    except OSError:
        return True


def on_disk(checkpoint: Any) -> Path:
    """Return the folder of one of Ray's checkpoints, fetched where it lies behind a URL: for as long as it takes to register it."""
    if checkpoint.filesystem.type_name == "local":
        return Path(checkpoint.path)
    target = home_folder() / "fetched" / "-".join(Path(checkpoint.path).parts[-2:])
    target.mkdir(parents=True, exist_ok=True)
    os.utime(target)  # one that is fetched again is in use again
    for folder in target.parent.iterdir():
        with suppress(FileNotFoundError):  # another run clears up too
            if time.time() - folder.stat().st_mtime > FETCHED_KEPT_S:
                shutil.rmtree(folder)
    return Path(checkpoint.to_directory(str(target)))
