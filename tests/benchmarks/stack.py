"""The whole job and the stack that it leaves: seconds of `make demo`, idle memory, registered to first token.

Reads `.tandem/demo.json` of a demo that has just run, and looks at the stack while it is up:
`PYTHONPATH=. python tests/benchmarks/stack.py`
"""

import json
import time

from bench import write_result

from cluster.home import BYTES_PER_GIB, home_folder
from cluster.registry import Registry
from cluster.session import require_session
from data.ask import Endpoint, first_token
from data.conversations import read_prepared

NUM_REPEATS = 3


def idle_gib() -> float:
    """Return the memory of all processes of the stack; shared pages are counted once."""
    family = [member for process in require_session().processes for member in process.family()]
    return sum(member.memory_full_info().pss for member in family) / BYTES_PER_GIB


def registered_to_first_token_s(endpoint: Endpoint, chatbot: str) -> float:
    """Register copies of the live adapter, ask each for the first time at once, and return the median of the seconds."""
    registry = Registry(require_session().mlflow_url)
    live = registry.find(chatbot)
    folder = registry.download(live)
    from cluster.registry import Manifest

    manifest = Manifest(**json.loads((folder / "manifest.json").read_text()))
    question = read_prepared(max((home_folder() / "data").glob("*/heldout.jsonl"), key=lambda file: file.stat().st_mtime))[0]
    seconds = []
    for _ in range(NUM_REPEATS):
        copy = registry.register(manifest, folder)
        registered_s = time.time()
        seconds.append(first_token(endpoint, copy.name, question).came_s - registered_s)
    return sorted(seconds)[NUM_REPEATS // 2]


def main() -> None:
    """Measure, and write the result."""
    demo = json.loads((home_folder() / "demo.json").read_text())
    figures = {
        "demo_s": demo["total_s"],
        "idle_stack_gib": idle_gib(),
        "registered_to_first_token_s": registered_to_first_token_s(Endpoint(demo["endpoint"], demo["api_key"]), demo["model"]),
        **{
            name: demo[name]
            for name in ("base_accuracy", "adapter_accuracy", "train_tokens_per_s", "finished_to_first_token_s", "finished_to_live_s")
        },
        **{f"demo_{name}_s": seconds for name, seconds in demo["stages_s"].items()},
    }
    write_result("stack", figures)


if __name__ == "__main__":
    main()
