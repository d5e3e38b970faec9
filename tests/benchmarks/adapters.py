"""Adapters on the engine: what one and eight cost, beside bare vLLM with the same ones; how soon a new one answers, and an engine again.

Random weights, rank 16 on every linear layer; 64 requests at once, 256 tokens in, 128 out. Wants a cluster that is up, and leaves a
chatbot `bench` in its registry: give it a TANDEM_HOME of its own. `--at-once 256 1` measures the base as `serving.py` does, too.
`PYTHONPATH=. python tests/benchmarks/adapters.py [--shape 8b|tiny] [--eager] [--at-once N ...]`
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median, quantiles

import psutil
from bench import SHAPES, make_model, run_cli, write_result
from serving import (
    BARE_PORT,
    NUM_PROMPTS,
    QUOTAS,
    TOKENS_IN,
    TOKENS_OUT,
    bare_vllm,
    compare_base,
    load,
    make_bench_config,
    proxy_name,
    take_key,
)

from cluster.models import model_fingerprint
from cluster.registry import Manifest, Registry, Version
from cluster.session import require_session
from configs.cli import console
from configs.errors import RunError
from configs.loader import load_chatbot
from data.ask import Endpoint, first_token, first_token_of, own_endpoint
from data.conversations import Conversation, Message

RANK, NUM_MIXED, NUM_HOT, NUM_PROMOTED = 16, 8, 20, 10
NUM_AT_ONCE, NUM_ROUNDS = 64, 3
STARTS_WITHIN_S = 600
SETTINGS = (f"serve.max_loras={NUM_MIXED}", "serve.max_cpu_loras=64")
QUESTION = Conversation((Message("user", "How do I start?"), Message("assistant", "Run make demo.")))


def make_adapter(shape: str, folder: Path, seed: int) -> Path:
    """Write an adapter of small random weights for every linear layer of a shape, as PEFT would."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    sizes = SHAPES[shape]
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    narrow = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    layers = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, narrow), "self_attn.v_proj": (hidden, narrow),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }  # fmt: skip
    chance = torch.Generator().manual_seed(seed)
    weights = {}
    for number in range(sizes["num_hidden_layers"]):
        for name, (size_in, size_out) in layers.items():
            for part, size in (("lora_A", (RANK, size_in)), ("lora_B", (size_out, RANK))):
                made = torch.randn(size, generator=chance) * 0.01
                weights[f"base_model.model.model.layers.{number}.{name}.{part}.weight"] = made.bfloat16()
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    targets = [name.partition(".")[2] for name in layers]
    LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(folder)
    return folder


class Shelf:
    """Registers versions of one chatbot."""

    def __init__(self, base: Path) -> None:
        self.base, self.fingerprint = base, model_fingerprint(base)
        self.registry = Registry(require_session().mlflow_url)
        client = self.registry.client
        found = client.get_experiment_by_name("bench")
        self.experiment_id = found.experiment_id if found else client.create_experiment("bench")

    def register(self, adapter: Path) -> Version:
        """Make the next version of an adapter's files."""
        run_id = self.registry.client.create_run(self.experiment_id).info.run_id
        targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
        none = {"data_fingerprint": "none", "config_fingerprint": "none", "git_commit": "unknown", "quantization": "none"}
        manifest = Manifest("bench", str(self.base), self.fingerprint, RANK, targets, **none, run_id=run_id, finished_s=time.time())
        return self.registry.register(manifest, adapter)


def compare(ports: dict[str, tuple[int, str]], base: Path, adapters: dict[str, Sequence[str]]) -> dict[str, float]:
    """Load both servers in turn, for the base, for one adapter and for all of them in turn; return medians, and shares of the base.

    A first round is not counted: kernels are compiled in it.
    """
    rounds: dict[str, list[float]] = {}
    for number in range(NUM_ROUNDS + 1):
        for server, (port, model) in sorted(ports.items(), reverse=number % 2 == 1):
            kinds = (("base", ()), ("one_adapter", adapters[server][:1]), ("eight_adapters", adapters[server]))
            for place, (kind, names) in enumerate(kinds):
                found = load(port, model, base, NUM_AT_ONCE, number * len(kinds) + place, names)
                console.print(f"{server}, {kind}{'' if number else ', not counted'}: {found}")
                if number:
                    rounds.setdefault(f"{server}_{kind}_tokens_per_s", []).append(found["tokens_per_s"])
    figures = {name: median(found) for name, found in rounds.items()}
    for kind in ("one_adapter", "eight_adapters"):
        figures[f"{kind}_ratio"] = figures[f"tandem_{kind}_tokens_per_s"] / figures["tandem_base_tokens_per_s"]
        figures[f"bare_{kind}_ratio"] = figures[f"bare_{kind}_tokens_per_s"] / figures["bare_base_tokens_per_s"]
    return figures


def loads(shelf: Shelf, endpoint: Endpoint, adapter: Path) -> dict[str, float]:
    """Ask versions that were just registered for the first time, and promote them; a warm first token is taken off the former."""
    versions = [shelf.register(adapter) for _ in range(NUM_HOT)]
    cold_s, promoted_s = [], []
    for version in versions:
        times = []
        for _ in range(2):
            asked_s = time.time()
            times.append(first_token(endpoint, version.name, QUESTION).came_s - asked_s)
        cold_s.append(times[0] - times[1])
    for version in versions[:NUM_PROMOTED]:
        asked_s = time.time()
        shelf.registry.promote(version.name)
        promoted_s.append(first_token_of(endpoint, version.chatbot, version.name, QUESTION).came_s - asked_s)
    at_95 = {"method": "inclusive", "n": 20}
    return {
        "adapter_load_p50_s": median(cold_s),
        "adapter_load_p95_s": quantiles(cold_s, **at_95)[-1],
        "promoted_to_first_token_p50_s": median(promoted_s),
        "promoted_to_first_token_p95_s": quantiles(promoted_s, **at_95)[-1],
    }


def start_again_s(endpoint: Endpoint, model: str) -> float:
    """Kill the engine's replica, and return the seconds until another one answers: its compile cache is there by then."""
    engines = _engines()
    assert engines, "no engine runs"
    for engine in engines:
        engine.kill()
    killed_s = time.monotonic()
    while time.monotonic() - killed_s < STARTS_WITHIN_S:
        time.sleep(1.0)
        try:
            first_token(endpoint, model, QUESTION)
        except RunError:
            continue
        assert not set(_engines()) & set(engines), "the engine that was killed answers"
        return time.monotonic() - killed_s
    raise SystemExit(f"no engine answers {STARTS_WITHIN_S} s after the first was killed")


def _engines() -> list[psutil.Process]:
    """Return the processes of the replicas that run."""
    found = []
    for member in (member for process in require_session().processes for member in process.family()):
        with suppress(psutil.NoSuchProcess):
            if "ServeReplica" in "".join(member.cmdline()):
                found.append(member)
    return found


def main() -> None:
    """Measure all of it on one engine, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--at-once", type=int, nargs="*", default=[], choices=NUM_PROMPTS, help="requests to the base, measured as well")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    base = make_model(arguments.shape)
    config_file = str(make_bench_config(base, arguments.eager))
    shelf = Shelf(base)
    folders = [make_adapter(arguments.shape, work / f"adapter-{number}", number) for number in range(NUM_MIXED)]
    names = [shelf.register(folder).name for folder in folders]
    started_s = time.monotonic()
    run_cli("serve", config_file, *SETTINGS)
    figures = {"start_s": time.monotonic() - started_s}
    take_key()
    config = load_chatbot(config_file, SETTINGS)
    endpoint = own_endpoint(config.serve)
    name = "adapters" if arguments.shape == "8b" else f"adapters-{arguments.shape}"
    notes = {"eager": arguments.eager, "rank": RANK, "at_once": NUM_AT_ONCE, "tokens_in": TOKENS_IN, "tokens_out": TOKENS_OUT}
    notes |= {"rounds": NUM_ROUNDS, "proxy": proxy_name(), "key": QUOTAS}
    bare_names = [folder.name for folder in folders]
    modules = ["--lora-modules", *(f"{folder.name}={folder}" for folder in folders)]
    with bare_vllm(config_file, SETTINGS, modules) as figures["bare_start_s"]:
        ports = {"bare": (BARE_PORT, "bench"), "tandem": (config.serve.port, base.name)}
        figures |= compare(ports, base, {"bare": bare_names, "tandem": names})
        write_result(name, figures, notes)  # so that a machine that is taken away leaves what was measured
        figures |= loads(shelf, endpoint, folders[0])
        write_result(name, figures, notes)
        figures["start_again_s"] = start_again_s(endpoint, base.name)
        write_result(name, figures, notes)
        for count in arguments.at_once:
            found, notes[f"each_round_of_{count}"] = compare_base(ports, base, count, NUM_ROUNDS)
            figures |= found
            write_result(name, figures, notes)


if __name__ == "__main__":
    main()
