"""Takes out of an image's environment what only developers need: packages of the extra `dev` that no other package asks for.

Runs on that environment's Python. Knows pyproject.toml and installed packages. Does not resolve anything.
"""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path


def name_of(requirement: str) -> str:
    """Return the package that a requirement names, spelt as the registry does."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub("[-_.]+", "-", found[0]).lower() if found else ""


def developers_packages(project: Path) -> list[str]:
    """Return the packages of the extra `dev` that are here and that nothing else here asks for."""
    dev = {name_of(line) for line in tomllib.loads(project.read_text())["project"]["optional-dependencies"]["dev"]}
    asked: dict[str, list[str]] = {
        name_of(found.metadata["Name"]): [name_of(line) for line in found.requires or [] if "extra ==" not in line]
        for found in distributions()
    }
    others = {needed for name, requires in asked.items() if name not in dev for needed in requires}
    return sorted(dev & asked.keys() - others)


if __name__ == "__main__":
    names = developers_packages(Path("pyproject.toml"))
    subprocess.run([sys.executable, "-m", "uv", "pip", "uninstall", "--python", sys.executable, *names], check=True)
