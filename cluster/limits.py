"""What this machine, or the container that Tandem runs in, may use of cores and memory.

Knows control groups (version 2) and which cores a process is kept to. Does not know cards.
"""

import math
import os
from pathlib import Path

import psutil

GROUP = Path("/sys/fs/cgroup")  # of a container its own; elsewhere that of the whole machine, which has no limits


def num_cpus() -> int:
    """Return the cores that this process may use, at least one."""
    there = len(os.sched_getaffinity(0))
    words = _read("cpu.max").split()
    if len(words) == 2 and words[0].isdigit():
        return max(1, min(there, math.floor(int(words[0]) / int(words[1]))))
    return there


def num_idle_cores() -> float:
    """Return how many of them had nothing to do since this was asked last; 0 where a process may not use them all, and nobody knows."""
    there = os.cpu_count() or 1
    return float(there * psutil.cpu_times_percent().idle / 100) if num_cpus() == there else 0.0


def memory_bytes() -> int:
    """Return the memory that may be used."""
    there, limit = int(psutil.virtual_memory().total), _read("memory.max").strip()
    return min(there, int(limit)) if limit.isdigit() else there


def _read(name: str) -> str:
    try:
        return (GROUP / name).read_text()
    except OSError:
        return ""
