"""Takes out of an image's environment what only developers need: what the extra `dev` brought and nothing else asks for.

Runs on that environment's Python. Knows pyproject.toml and what installed packages ask for. Does not resolve anything.
"""

import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

KEPT_EXTRAS = ("cpu", "gpu")


def developers_packages(project: Path) -> list[str]:
    """Return the packages that are here for developers alone."""
    told = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    extras = told["optional-dependencies"]
    needed = reachable([*told["dependencies"], *(line for extra in KEPT_EXTRAS for line in extras[extra])])
    return sorted(reachable(extras["dev"]) - needed)


def reachable(lines: Iterable[str]) -> set[str]:
    """Return the installed packages that these requirements lead to."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(line) for line in lines]
    while waiting:
        wanted = waiting.pop()
        entry = (str(canonicalize_name(wanted.name)), frozenset(wanted.extras))
        if entry in found:
            continue
        try:
            asked = [Requirement(line) for line in requires(wanted.name) or []]
        except PackageNotFoundError:
            continue  # left out of the lock on purpose, or another machine's
        found.add(entry)
        waiting += [line for line in asked if line.marker is None or any(line.marker.evaluate({"extra": e}) for e in (*entry[1], ""))]
    return {name for name, _ in found}


if __name__ == "__main__":
    names = developers_packages(Path("pyproject.toml"))
    subprocess.run([sys.executable, "-m", "uv", "pip", "uninstall", "--python", sys.executable, *names], check=True)
