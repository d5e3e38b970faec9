"""Tandem's endpoint against bare vLLM with the same arguments, by vLLM's own benchmark client, in the same run.

`python tests/benchmarks/serving.py [--shape 8b|tiny] [--eager]`; 256 tokens in, 128 out, streamed. The cluster must be up; on a single GPU
each has the serve card's share of its memory, half of it, and they are loaded in turn, after a round that is not counted. A round has
prompts of its own, the same for both: else an engine's cache of prefixes knows as many of them as it has memory for.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import httpx
import psutil
from bench import make_model, run_cli, write_result

from cluster.limits import num_cpus
from cluster.session import require_session
from configs.cli import console
from configs.loader import ROOT, load_chatbot
from serve.engine import BESIDE, OUTPUT_CHUNK, engine_arguments, engine_environment

BARE_PORT = 8100
NUM_PROMPTS = {1: 8, 64: 256, 256: 1024}
OURS = ("--worker-cls", "--cudagraph-capture-sizes")  # arguments that bare vLLM does without
BARE_MODULE = "vllm.entrypoints.openai.api_server"
WRITERS = {"bare": BARE_MODULE, "tandem": "ray::ServeReplica"}  # whose one loop writes all answers, and is the limit with many at once
TOKENS_IN, TOKENS_OUT = 256, 128
START_TIMEOUT_S, CLIENT_TIMEOUT_S = 400, 300
QUOTAS = "with quotas of requests and of tokens"

Rounds = dict[str, list[float]]
"""What each round gave, by the figure's name."""


@contextlib.contextmanager
def bare_vllm(config_file: str, overrides: Sequence[str] = (), modules: Sequence[str] = ()) -> Iterator[float]:
    """Start vLLM's own API server with a replica's arguments but `OURS`, and adapters by its own; yield the seconds that it took."""
    config, session = load_chatbot(config_file, overrides), require_session()
    shares = [float(card["gpu-share"]) for card in session.cards if card["pool"] == "serve" and "gpu-share" in card]
    share = min(shares) if shares else None
    arguments = engine_arguments(config.model, config.serve, Path(config.model.name), "bench", share)
    for name in OURS:
        if name in arguments:
            begin = arguments.index(name)
            end = next(place for place in range(begin + 1, len(arguments) + 1) if place == len(arguments) or arguments[place][:2] == "--")
            del arguments[begin:end]
    environment = {**os.environ, **engine_environment(config.serve, share is not None), "OMP_NUM_THREADS": str(num_cpus())}
    environment = {name: value for name, value in environment.items() if name not in OUTPUT_CHUNK | BESIDE}
    command = [sys.executable, "-m", BARE_MODULE, "--port", str(BARE_PORT), *arguments, *modules]
    started_s = time.monotonic()
    log = Path(tempfile.gettempdir()) / "tandem-bare-vllm.log"
    with log.open("w") as stream:
        server = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True, cwd=ROOT)
    try:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{BARE_PORT}/health", timeout=5).is_success:
                    break
            if server.poll() is not None or time.monotonic() - started_s > START_TIMEOUT_S:
                raise SystemExit(f"bare vLLM did not start:\n{log.read_text()[-3000:]}")
            time.sleep(1)
        yield time.monotonic() - started_s
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def take_key() -> None:
    """Make a key whose requests and tokens are counted, and let the client ask with it; bare vLLM asks for none."""
    said = run_cli("serve", "keys", "create", f"bench-{int(time.time())}", "--rpm", str(10**6), "--tpm", str(10**9))
    os.environ["OPENAI_API_KEY"] = said.split()[1]


def run_client(words: list[str], log: Path) -> None:
    """Be vLLM's benchmark client with these arguments; what it says goes into a file."""
    with log.open("w") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args(words))


def load(port: int, model: str, tokenizer: Path, num_at_once: int, seed: int, adapters: Sequence[str] = ()) -> dict[str, float]:
    """Run vLLM's benchmark client once, on the model or on its adapters in turn; return tokens/s and the median time to first token.

    The prompts are drawn by `seed`.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "backend": "openai", "base-url": f"http://127.0.0.1:{port}", "endpoint": "/v1/completions", "model": model,
            "tokenizer": str(tokenizer), "dataset-name": "random", "random-input-len": TOKENS_IN, "random-output-len": TOKENS_OUT,
            "num-prompts": NUM_PROMPTS[num_at_once], "max-concurrency": num_at_once, "num-warmups": min(num_at_once, 16),
            "result-dir": folder, "result-filename": "result.json", "seed": seed,
        }  # fmt: skip
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        words += ["--lora-assignment", "round-robin", "--lora-modules", *adapters] if adapters else []
        log = Path(folder) / "client.log"
        # Forked from a process that has vLLM imported, which takes longer than most rounds; its environment is that of the first time.
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["vllm.benchmarks.serve"])
        client = processes.Process(target=run_client, args=([*words, "--save-result", "--ignore-eos", "--disable-tqdm"], log), daemon=True)
        client.start()
        client.join(CLIENT_TIMEOUT_S)
        if client.exitcode != 0:
            raise SystemExit(f"the benchmark client failed ({client.exitcode}):\n{log.read_text()[-4000:]}")
        result = json.loads((Path(folder) / "result.json").read_text())
    assert result["completed"] == NUM_PROMPTS[num_at_once], result
    return {"tokens_per_s": result["output_throughput"], "ttft_ms": result["median_ttft_ms"], "tpot_ms": result["median_tpot_ms"]}


def cpu_s(name: str) -> float:
    """Return the CPU seconds so far of the process that writes the answers of one of both."""
    family = [member for process in require_session().processes for member in process.family()]
    seconds = 0.0
    for process in (*psutil.Process().children(), *family):
        with contextlib.suppress(psutil.Error):
            if WRITERS[name] in " ".join(process.cmdline()):
                seconds += sum(process.cpu_times()[:2])
    return seconds


def proxy_name() -> str:
    """Return which proxy stands before the engine."""
    names = {member.name() for process in require_session().processes for member in process.family()}
    return "HAProxy" if "haproxy" in names else "Serve's Python proxy"


def make_bench_config(folder: Path, eager: bool) -> Path:
    """Write the chatbot that is served: a model of random weights."""
    config = Path(tempfile.mkdtemp(prefix="tandem-bench-")) / "bench.yaml"
    config.write_text(
        f"name: bench\nmodel: {{name: {folder}}}\ndata: {{source: data/helpdesk.jsonl, split: marked, max_length_tokens: 128}}\n"
        f"serve: {{max_num_seqs: 256, max_lora_rank: 16, max_model_len_tokens: 1024, enforce_eager: {str(eager).lower()}}}\n"
    )
    return config


def compare_base(ports: dict[str, tuple[int, str]], tokenizer: Path, count: int, num_rounds: int) -> tuple[dict[str, float], Rounds]:
    """Load both in turn, so many times and once more before that; return the medians, and what each round gave.

    In turn, and each first once: a machine whose speed changes must not favour the one that was measured later.
    """
    rounds: Rounds = {}
    for number in range(num_rounds + 1):
        for name, (port, model) in sorted(ports.items(), reverse=number % 2 == 1):
            began_s = cpu_s(name)
            result = load(port, model, tokenizer, count, seed=1000 * count + number)
            result["cpu_us_per_token"] = (cpu_s(name) - began_s) * 1e6 / (NUM_PROMPTS[count] * TOKENS_OUT)
            console.print(f"{name}, {count} at once{'' if number else ', not counted'}: {result}")
            if number:
                for key, value in result.items():
                    rounds.setdefault(f"{name}_c{count}_{key}", []).append(round(value, 3))
    figures = {key: median(values) for key, values in rounds.items()}
    figures[f"serve_ratio_c{count}"] = figures[f"tandem_c{count}_tokens_per_s"] / figures[f"bare_c{count}_tokens_per_s"]
    figures[f"cpu_ratio_c{count}"] = figures[f"tandem_c{count}_cpu_us_per_token"] / figures[f"bare_c{count}_cpu_us_per_token"]
    figures[f"ttft_added_c{count}_ms"] = figures[f"tandem_c{count}_ttft_ms"] - figures[f"bare_c{count}_ttft_ms"]
    return figures, rounds


def main() -> None:
    """Start bare vLLM and Tandem side by side, measure them in turn, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--rounds", type=int, nargs="+", default=[5], help="for each of --at-once, or for all")
    parser.add_argument("--eager", action="store_true")
    arguments = parser.parse_args()
    folder = make_model(arguments.shape)
    config = make_bench_config(folder, arguments.eager)
    started_s = time.monotonic()
    run_cli("serve", str(config))
    figures = {"start_s": time.monotonic() - started_s}
    take_key()
    each_round: Rounds = {}
    notes = {"eager": arguments.eager, "tokens_in": TOKENS_IN, "tokens_out": TOKENS_OUT, "proxy": proxy_name(), "key": QUOTAS}
    notes["each_round"] = each_round
    rounds_of = arguments.rounds if len(arguments.rounds) > 1 else arguments.rounds * len(arguments.at_once)
    with bare_vllm(str(config)) as figures["bare_start_s"]:
        ports = {"bare": (BARE_PORT, "bench"), "tandem": (load_chatbot(config).serve.port, folder.name)}
        for count, num_rounds in zip(arguments.at_once, rounds_of, strict=True):
            found, rounds = compare_base(ports, folder, count, num_rounds)
            figures |= found
            figures["ttft_added_ms"] = max(value for name, value in figures.items() if name.startswith("ttft_added_c"))
            each_round |= rounds
            # After each, so that a machine that is taken away leaves what was measured.
            write_result("serving" if arguments.shape == "8b" else f"serving-{arguments.shape}", figures, notes)


if __name__ == "__main__":
    main()
