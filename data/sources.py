"""The version of a file or folder, named as DVC names it: so a manifest can be compared with `dvc.lock`.

Knows DVC's hash and its lock file. Does not need DVC.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

PIECE_BYTES = 2**20


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
