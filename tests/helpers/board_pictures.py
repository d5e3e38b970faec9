"""Draws the README's pictures of the boards: a real stack on a tiny model, some minutes of chat and jobs, and what Prometheus answers.

    PYTHONPATH=. python tests/helpers/board_pictures.py

Each panel is a query of `cluster.boards`, asked with query_range; Grafana itself is not needed.
"""

import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from matplotlib.figure import Figure

from cluster.boards import BOARDS, FOLDER, RATE, Panel
from tests.helpers.prometheus import Prometheus, own_prometheus
from tests.ray.stack import Stack, make_config, make_tiny_model, own_stack, wait_for

NUM_CLIENTS = 3
CHAT_S, REST_S = 120.0, 60.0
STEP_S = 5
WINDOW = "1m"
PICTURES = {
    "chat": ["Requests, by status", "Answer tokens, by version", "First token, whose part (p95)", "Refused and failed, by key"],
    "cards": ["Tokens a second", "Loss", "Busy share, by holder", "Jobs in line"],
    "adapters": ["Versions loaded, by engine", "Tokens, by version", "First token, by version (p50)"],
}


def draw(prometheus: Prometheus, names: list[str], begin_s: float, file: Path) -> None:
    """Draw panels side by side, from `begin_s` until now."""
    panels = {panel.title: panel for board in BOARDS.values() for panel in board}
    figure = Figure(figsize=(3.6 * len(names), 2.9), dpi=80)
    for name, axis in zip(names, figure.subplots(1, len(names)), strict=True):
        _draw_panel(prometheus, panels[name], begin_s, axis)
    figure.tight_layout()
    figure.savefig(file)
    print(file, f"{file.stat().st_size / 1000:.0f} kB")


def _draw_panel(prometheus: Prometheus, panel: Panel, begin_s: float, axis) -> None:
    for legend, query in panel.queries.items():
        asked = {"query": query.replace(RATE, WINDOW), "start": begin_s, "end": time.time(), "step": STEP_S}
        for curve in prometheus.get("query_range", **asked)["result"]:
            label = legend
            for key, value in curve["metric"].items():
                label = label.replace(f"{{{{{key}}}}}", value)
            points = [((at - begin_s) / 60, float(value)) for at, value in curve["values"]]
            if any(value for _, value in points):
                axis.plot(*zip(*points, strict=True), label=label)
    axis.set_title(panel.title, fontsize=9)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=7)
    axis.set_xlabel("minutes", fontsize=7)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=6)


@contextmanager
def chatting(stack: Stack, models: list[str], secrets: list[str]) -> Iterator[None]:
    """Keep some clients asking for streams."""
    done = threading.Event()

    def client(seed: int) -> None:
        drawn = random.Random(seed)
        while not done.wait(drawn.random()):
            with suppress(httpx.HTTPError):
                number = drawn.randrange(1000)
                stack.ask(
                    drawn.choice(models), f"What is number {number}?", drawn.choice(secrets), stream=True, max_tokens=48, ignore_eos=True
                )

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(NUM_CLIENTS)]
    for thread in clients:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in clients:
            thread.join()


def take(stack: Stack, config: Path, models: list[str], folder: Path) -> None:
    """Let a stack that serves work for some minutes, and draw what Prometheus saw."""
    secrets = [stack.make_key("alice"), stack.make_key("bob", "--rpm", "20"), "sk-unknown"]
    wait_for(lambda: all(stack.ask(model, secret=secrets[0]).status_code == 200 for model in models))
    with own_prometheus(folder, stack.home, "5s") as prometheus:
        begin_s = time.time()
        for words in (["train.num_workers=2", "name=long"], ["name=short"]):
            done = stack.run("cluster", "submit", str(config), "train.max_steps=100000", *words)
            assert done.returncode == 0, done.stderr
        with chatting(stack, models, secrets):
            time.sleep(CHAT_S)
        time.sleep(REST_S)
        for name, panels in PICTURES.items():
            draw(prometheus, panels, begin_s, FOLDER / "boards" / f"{name}.png")
    for number in ("1", "2"):
        stack.run("cluster", "cancel", number)


def main() -> None:
    """Start all, let it work, and end all."""
    with tempfile.TemporaryDirectory() as name, own_stack(Path(name) / "stack") as stack:
        folder = Path(name)
        model = make_tiny_model(folder / "tiny-model")
        config = make_config(stack.folder, model, stack.ports["chat"])
        first, second = (stack.train(config, "name=helpdesk", f"train.seed={seed}") for seed in (1, 2))
        stack.serve(config, "serve.scaling.min_replicas=1", "serve.scaling.use_train_cards=false")
        assert stack.run("serve", "promote", second.name).returncode == 0
        take(stack, config, ["helpdesk", first.name, model.name], folder / "prometheus")


if __name__ == "__main__":
    main()
