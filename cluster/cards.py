"""The cards of this machine: one per GPU, or without a GPU two shares of the CPU.

Knows nvidia-smi and pools. Does not know Ray: `cluster.stack` starts one raylet for each card found here.
"""

import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.home import BYTES_PER_GIB
from cluster.limits import memory_bytes, num_cpus
from cluster.placement import HEAD, OWN_CORES
from configs.errors import ClusterError
from configs.schema import CardConfig, MachineConfig

GPU_QUERY = "index,name,memory.total,memory.free,driver_version,compute_cap"
MIB_PER_GIB = 1024
MIN_BF16_CAPABILITY = 8.0
MIN_FP8_CAPABILITY = 8.9
MAX_LABEL_LETTERS = 63


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi tells of it; `index` is what CUDA_VISIBLE_DEVICES takes."""

    index: str
    name: str
    memory_gib: float
    memory_free_gib: float
    driver: str
    compute_capability: float

    @property
    def has_bf16(self) -> bool:
        """Whether the GPU computes in bf16."""
        return self.compute_capability >= MIN_BF16_CAPABILITY

    @property
    def has_fp8(self) -> bool:
        """Whether the GPU multiplies in FP8."""
        return self.compute_capability >= MIN_FP8_CAPABILITY


@dataclass(frozen=True)
class Card:
    """One card of a pool: a GPU or part of one, or a share of the CPU; its raylet sees nothing else."""

    name: str
    pool: str
    num_cpus: int
    memory_gib: float
    gpu: Gpu | None = None
    gpu_share: float = 1.0
    machine: str = HEAD
    cores: tuple[int, ...] = ()
    """Its own; empty where it shares all with the others."""

    @property
    def accelerator(self) -> str:
        """Name of the accelerator as a Ray label allows it: letters, digits and dashes."""
        return "-".join(re.findall("[A-Za-z0-9.]+", self.gpu.name))[:MAX_LABEL_LETTERS].strip("-.") if self.gpu else "cpu"

    @property
    def labels(self) -> dict[str, str]:
        """Labels by which Ray places work."""
        memory_gib = math.floor(self.memory_gib * 100) / 100
        own_cores = {OWN_CORES: str(len(self.cores))} if self.cores else {}
        on_gpu = {}
        if self.gpu:
            formats = {"bf16": self.gpu.has_bf16, "fp8": self.gpu.has_fp8}
            on_gpu = {"gpu-share": f"{self.gpu_share:g}", **{name: str(has).lower() for name, has in formats.items()}}
        return {
            "machine": self.machine,
            "pool": self.pool,
            "card": self.name,
            "accelerator": self.accelerator,
            "memory-gib": f"{memory_gib:g}",
            **own_cores,
            **on_gpu,
        }

    def kept_to_cores(self, command: list[str]) -> list[str]:
        """Return a command so that it, and all that it starts, computes on the card's own cores alone, if it has any."""
        return ["taskset", "--cpu-list", ",".join(map(str, self.cores)), *command] if self.cores else command


def find_gpus() -> list[Gpu]:
    """Ask nvidia-smi for the GPUs that CUDA_VISIBLE_DEVICES leaves visible; none where there is no driver."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode:
        return []
    gpus = []
    for line in answer.stdout.strip().splitlines():
        index, name, total_mib, free_mib, driver, capability = (part.strip() for part in line.split(","))
        memory = psutil.virtual_memory()  # a GPU that shares the host's memory tells of none
        total_gib, free_gib = (
            float(mib) / MIB_PER_GIB if mib.isdigit() else shared / BYTES_PER_GIB
            for mib, shared in ((total_mib, memory.total), (free_mib, memory.available))
        )
        gpus.append(Gpu(index, name, total_gib, free_gib, driver, float(capability)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpus if visible is None else [gpu for gpu in gpus if gpu.index in visible.split(",")]


def cpu_has_bf16() -> bool:
    """Whether this machine's CPU computes in bf16 as PyTorch wants it (AVX-512), so that `auto` precision takes it."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def find_cards(machine: MachineConfig, gpus: list[Gpu] | None = None) -> list[Card]:
    """Make the machine's cards, serve cards first.

    Raises:
        ClusterError: The config names a GPU or a core that is not there, or names one GPU twice.
    """
    gpus = find_gpus() if gpus is None else gpus
    wanted = _auto(gpus) if machine.cards == "auto" else machine.cards
    if not wanted:
        return []
    cpus, memory_gib = max(1, num_cpus() // len(wanted)), memory_bytes() / BYTES_PER_GIB / len(wanted)
    cards: list[Card] = []
    left = {gpu.index: gpu for gpu in gpus}
    for number, card in enumerate(sorted(wanted, key=lambda entry: entry.pool)):
        cores = _own_cores(card)
        num_cores = len(cores) or cpus
        if card.gpu is None:
            cards.append(Card(f"card{number}", card.pool, num_cores, memory_gib, cores=cores))
            continue
        shared_by = sum(other.gpu == card.gpu for other in wanted) if machine.cards == "auto" else 1
        gpu = _pick(card.gpu, left, gpus)
        if shared_by == 1:
            del left[gpu.index]
        cards.append(Card(f"card{number}", card.pool, num_cores, gpu.memory_gib / shared_by, gpu, 1 / shared_by, cores=cores))
    return cards


def _own_cores(card: CardConfig) -> tuple[int, ...]:
    there = os.sched_getaffinity(0)
    if missing := sorted(set(card.core_numbers) - there):
        what = f"there is no core {missing[0]} here for a {card.pool} card"
        raise ClusterError(what, f"cores here: {', '.join(map(str, sorted(there)))}", "name others, or leave out `cores`")
    if card.cores and not shutil.which("taskset"):
        raise ClusterError("cards cannot have cores of their own here", "there is no `taskset`", "install util-linux, or leave out `cores`")
    return card.core_numbers


def _auto(gpus: list[Gpu]) -> list[CardConfig]:
    """Largest GPU trains, the next answers, and so on in turn; a single GPU is shared half and half."""
    if not gpus:
        return [CardConfig(pool="serve"), CardConfig(pool="train")]
    if len(gpus) == 1:
        return [CardConfig(pool="serve", gpu=gpus[0].index), CardConfig(pool="train", gpu=gpus[0].index)]
    by_memory = sorted(gpus, key=lambda gpu: -gpu.memory_gib)
    return [CardConfig(pool="train" if place % 2 == 0 else "serve", gpu=gpu.index) for place, gpu in enumerate(by_memory)]


def _pick(wanted: str, left: dict[str, Gpu], gpus: list[Gpu]) -> Gpu:
    # A number names a GPU exactly, even where it stands in another's name ("5090").
    meant = [gpu for gpu in gpus if gpu.index == wanted] or [gpu for gpu in gpus if wanted.lower() in gpu.name.lower()]
    free = [gpu for gpu in meant if gpu.index in left]
    if not free:
        there = ", ".join(f"{gpu.index}: {gpu.name}" for gpu in gpus) or "none"
        raise ClusterError(
            f"no free GPU {wanted!r} on this machine", f"GPUs here: {there}", "`python -m cluster up auto` takes what is there"
        )
    return free[0]
