"""Checks the machine before anything is started: one finding a line, with a remedy where it fails.

Knows GPUs, versions, ports, disk, memory and tokens. Does not change anything.
"""

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import psutil

from cluster.bootstrap import choose_lock
from cluster.cards import find_gpus
from cluster.home import BYTES_PER_GIB, home_folder
from cluster.processes import port_owner
from cluster.session import read_session, token_file
from configs.schema import Environment, MachineConfig, ServeConfig

MIN_MEMORY_GIB = 8
MIN_GPU_FREE_SHARE = 0.9
MIN_OPEN_FILES = 4096
LOCKED = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;+]+)")
MAX_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    mark: Literal["ok", "warn", "fail"]
    what: str
    found: str
    remedy: str = ""


def examine(machine: MachineConfig) -> list[Finding]:
    """Check everything; nothing is started or changed."""
    checks = (_gpus(), _torch(), _versions(), _ports(machine), _room(machine), _tokens())
    return [finding for check in checks for finding in check]


def _gpus() -> Iterator[Finding]:
    gpus = find_gpus()
    if not gpus:
        yield Finding("ok", "GPU", "none: two cards are made of the CPU")
    for gpu in gpus:
        number = "bf16" if gpu.has_bf16 else "no bf16: fp32 is used"
        found = (
            f"{gpu.name}, {gpu.memory_free_gib:.1f} of {gpu.memory_gib:.1f} GiB free, driver {gpu.driver}, "
            f"compute capability {gpu.compute_capability}, {number}"
        )
        busy = gpu.memory_free_gib < MIN_GPU_FREE_SHARE * gpu.memory_gib and read_session() is None
        yield Finding(
            "warn" if busy else "ok", f"GPU {gpu.index}", found, "another program holds its memory: see nvidia-smi" if busy else ""
        )


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("fail", "torch", str(error), "make setup")
        return
    has_gpu, build = bool(find_gpus()), torch.version.cuda
    found = f"{torch.__version__}, {f'CUDA {build}' if build else 'CPU build'}, {torch.get_num_threads()} threads"
    if has_gpu and not torch.cuda.is_available():
        yield Finding("fail", "torch", f"{found}: does not see the GPU", "rm -r .venv && make setup; if it stays, update the NVIDIA driver")
    else:
        yield Finding("ok", "torch", found)


def _versions() -> Iterator[Finding]:
    lock = choose_lock()
    wrong, count = [], 0
    for line in lock.read_text().splitlines():
        if not (match := LOCKED.match(line)):
            continue
        count += 1
        try:
            version = importlib.metadata.version(match[1]).partition("+")[0].removeprefix("v")  # some packages write v1.2 for 1.2
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        if version != match[2]:
            wrong.append(f"{match[1]} {version} (lock: {match[2]})")
    if wrong:
        rest = f" and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
        yield Finding("fail", "versions", f"{', '.join(wrong[:MAX_NAMED])}{rest}", "make setup")
    else:
        yield Finding("ok", "versions", f"all {count} as in {lock.name}, Python {platform.python_version()}")


def _ports(machine: MachineConfig) -> Iterator[Finding]:
    session = read_session()
    ours = bool(session and not session.missing_parts())
    ports = {"Ray": machine.ray_port, "dashboard": machine.dashboard_port, "MLflow": machine.mlflow_port, "chat": ServeConfig().port}
    for name, port in ports.items():
        owner = port_owner(machine.listen_host, port)
        if owner and not ours:
            yield Finding("fail", f"port {port} ({name})", f"held by {owner}", "end that process, or choose another port")
        else:
            yield Finding("ok", f"port {port} ({name})", "held by Tandem" if owner else "free")


def _room(machine: MachineConfig) -> Iterator[Finding]:
    free_gib = shutil.disk_usage(home_folder()).free / BYTES_PER_GIB
    enough = free_gib >= machine.min_disk_free_gib
    remedy = "" if enough else "delete old runs there, or set TANDEM_HOME to a folder on a larger disk"
    yield Finding("ok" if enough else "fail", "disk", f"{free_gib:.1f} GiB free under {home_folder()}", remedy)
    memory = psutil.virtual_memory()
    enough = memory.available / BYTES_PER_GIB >= MIN_MEMORY_GIB or read_session() is not None
    remedy = "" if enough else f"the demo wants {MIN_MEMORY_GIB} GiB: end other programs"
    found = f"{memory.available / BYTES_PER_GIB:.1f} of {memory.total / BYTES_PER_GIB:.1f} GiB free, {os.cpu_count()} cores"
    yield Finding("ok" if enough else "warn", "memory", found, remedy)
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard >= MIN_OPEN_FILES
    yield Finding(
        "ok" if enough else "warn", "open files", f"limit {soft}, at most {hard}", "" if enough else f"ulimit -n {MIN_OPEN_FILES}"
    )


def _tokens() -> Iterator[Finding]:
    file = token_file()
    if not file.is_file():
        yield Finding("ok", "Ray token", "none yet: `python -m cluster up` makes one")
    elif file.stat().st_mode & 0o077:
        yield Finding("fail", "Ray token", f"{file} can be read by others", f"chmod 600 {file}")
    else:
        yield Finding("ok", "Ray token", f"{file}, readable by you alone")
    if Environment().huggingface_token:
        yield Finding("ok", "HUGGINGFACE_TOKEN", "set")
    else:
        yield Finding("warn", "HUGGINGFACE_TOKEN", "not set", "only gated models such as Llama 3 need it: HUGGINGFACE_TOKEN=hf_... in .env")
