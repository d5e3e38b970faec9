"""Makes `.venv` from a lock: no resolution, and the CPU or GPU set by what the machine has.

Runs on the system's Python, with nothing installed; knows pip and uv. Does nothing where all is as the lock says.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get("TANDEM_VENV", ROOT / ".venv"))
UV_VERSION = "0.13.9"
EXIT_BAD_INPUT = 2
PYTHONS = {"lock-cpu.txt": ((3, 11),), "lock-gpu.txt": ((3, 11), (3, 12))}


def choose_lock() -> Path:
    """Return the lock for this machine: the GPU set where nvidia-smi finds a GPU; TANDEM_SET (`cpu`, `gpu`) chooses for another's."""
    if wanted := os.environ.get("TANDEM_SET"):
        return ROOT / f"lock-{wanted}.txt"
    has_gpu = False
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
        has_gpu = listed.returncode == 0 and "GPU" in listed.stdout
    return ROOT / ("lock-gpu.txt" if has_gpu else "lock-cpu.txt")


def is_done(lock: Path) -> bool:
    """Whether `.venv` was made from this very lock, by this very Python."""
    return stamp_file().is_file() and stamp_file().read_text() == stamp(lock) and (VENV / "bin" / "python").exists()


def stamp_file() -> Path:
    """Return the file that says what `.venv` was made from."""
    return VENV / "made-from"


def stamp(lock: Path) -> str:
    """Return what identifies a set-up: the lock's content and Python's version."""
    return f"{hashlib.sha256(lock.read_bytes()).hexdigest()} {sys.version}"


def install(lock: Path) -> None:
    """Make `.venv` afresh, without what an older lock left in it, and install the lock into it."""
    venv.create(VENV, with_pip=True, clear=True)
    stamp_file().write_text("unfinished")
    python = str(VENV / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"uv=={UV_VERSION}"], check=True)
    # Compiled once here; else each of the stack's 20 processes compiles what it imports, wherever Python may not write beside the source.
    options = ["--no-deps", "--compile-bytecode", "--python", python]
    command = [python, "-m", "uv", "pip", "install", *options, "-r", str(lock), *torch_source(lock)]
    environment = {**os.environ, "UV_LINK_MODE": os.environ.get("UV_LINK_MODE", "copy"), "UV_HTTP_TIMEOUT": "300"}
    subprocess.run(command, check=True, env=environment)
    stamp_file().write_text(stamp(lock))


def torch_source(lock: Path) -> list[str]:
    """Return where uv finds the CPU build of torch: a folder that pip is configured with, or else PyTorch's own index."""
    if lock.name != "lock-cpu.txt":
        return []
    # uv does not read pip's configuration.
    asked = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True, check=False)
    folders = asked.stdout.split() or os.environ.get("PIP_FIND_LINKS", "").split()
    if folders:
        return [word for folder in folders for word in ("--find-links", folder)]
    return ["--torch-backend", "cpu"]


def main() -> int:
    """Set up what is missing; return the exit status."""
    lock = choose_lock()
    if sys.version_info[:2] not in PYTHONS[lock.name]:
        wanted = " or ".join(".".join(map(str, version)) for version in PYTHONS[lock.name])
        print(
            f"error: Python {wanted} is needed for {lock.name}, this is {sys.version.split()[0]}\nTry: make setup PYTHON=python3.11",
            file=sys.stderr,
        )
        return EXIT_BAD_INPUT
    if is_done(lock):
        return 0
    if VENV.is_dir() and any(VENV.iterdir()) and not stamp_file().is_file():
        print(f"error: {VENV} is there, and not made by make setup\nTry: remove it, or make setup VENV=another", file=sys.stderr)
        return EXIT_BAD_INPUT
    started_s = time.monotonic()
    print(f"setting up {VENV.name} from {lock.name}: installed in half a minute, compiled in another", flush=True)
    try:
        install(lock)
    except (subprocess.CalledProcessError, OSError) as error:
        failed = f"{' '.join(error.cmd[:5])} ..." if isinstance(error, subprocess.CalledProcessError) else str(error)
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
        remedy = f"the network, the disk and, on Debian or Ubuntu, apt install {package}; then make setup again"
        print(f"error: set-up failed: {failed}\nTry: {remedy}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"set up in {time.monotonic() - started_s:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
