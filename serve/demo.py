"""The whole job, told as a story: cluster, data, fine-tune, registry, serving, live.

Uses the same doors as a user: `ray job submit`, the registry, the OpenAI endpoint. Does not import training.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.home import home_folder, write_text
from cluster.models import check_model, ensure_model
from cluster.registry import Registry, Version
from cluster.session import Session, start
from configs.cli import console
from configs.errors import RunError
from configs.loader import ROOT, load_machine
from configs.schema import ChatbotConfig
from data.conversations import Conversation, question, read_prepared
from data.prepare import Prepared, check_source, prepare
from serve.ask import Answer, accuracy, ask_all, first_token_s
from serve.deploy import deploy, endpoint, served_base_name, wait_until_running

MAX_ANSWER_TOKENS = 48
NUM_SHOWN = 5
PROGRESS_LINE = re.compile(r"step (\d+)/(\d+)")
REGISTERED_LINE = re.compile(r"registered as ([a-z0-9._-]+:\d+)")
LAST_LINES = 15


@dataclass
class Story:
    """Seconds of each stage, and a heading and a progress bar for each."""

    stages_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Tell the title, run the stage, keep its seconds."""
        console.print(f"\n[bold cyan]{len(self.stages_s) + 1}. {title}[/]")
        started_s = time.monotonic()
        yield
        self.stages_s[name] = round(time.monotonic() - started_s, 1)
        console.print(f"   [dim]{self.stages_s[name]:.0f} s[/]")


@contextmanager
def bar(text: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show a progress bar, or where the total is unknown one that moves; yield a function that sets or advances it."""
    columns = (TextColumn("   {task.description}"), BarColumn(bar_width=30), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(text, total=total, note="")

        def update(completed: int | None = None, total: int | None = None, note: str = "", text: str | None = None) -> None:
            step = 1 if completed is None and text is None else None
            progress.update(task, advance=step, completed=completed, total=total, description=text, note=note)

        yield update


def tell(config: ChatbotConfig, config_file: str, overrides: list[str]) -> dict[str, Any]:
    """Run the whole job once and return its figures, which are also written to `demo.json` in the home folder."""
    story = Story()
    check_source(config.data)
    check_model(config.model)
    with story.stage("cluster", "Start the cluster: two cards, MLflow and the dashboard"):
        with bar("starting") as update:
            session = start(load_machine(), lambda step: update(text=step))
        for card in session.cards:
            what = "answers questions" if card["pool"] == "serve" else "trains"
            console.print(f"   {card['card']} ({card['accelerator']}, {card['memory-gib']} GiB) [bold]{what}[/]")
        console.print(f"   MLflow {session.mlflow_url} · dashboard {session.dashboard_url} (token in {home_folder() / 'ray_token'})")
    with story.stage("data", f"Prepare the data: {config.data.source}"):
        data = _prepare(config)
    with story.stage("engine", f"Wake the serve card: {config.model.name} on one vLLM engine, before any training"):
        address = deploy(config, session, lambda _: None, wait=False)
        with bar("loading the engine") as update, session.dashboard() as client:
            wait_until_running(client, lambda words: update(text=words))
        console.print(f"   {served_base_name(config.model.name)} answers at {address}")
    with story.stage("train", "Fine-tune on the train card, as a Ray job"):
        version = _train(session, config_file, overrides)
    heldout = read_prepared(data.heldout_file)
    first_s = first_token_s(address, version.name, heldout[0])
    waited_s = first_s - float(version.tags["finished_s"])
    with story.stage("register", "The adapter is in the registry"):
        _show_version(version, session)
    with story.stage("ask", "Ask base and adapter the same held-out questions, on the same engine"):
        base_answers, adapter_answers = _ask_both(config, version, heldout)
    with story.stage("live", f"Make {version.name} live"):
        Registry(session.mlflow_url).promote(version.name)
        console.print(f"   requests for [bold]{config.name}[/] now go to [bold]{version.name}[/]; the engine did not restart")
    figures = {
        "model": config.name,
        "version": version.name,
        "endpoint": address,
        "api_key": None,
        "base_accuracy": round(accuracy(base_answers), 4),
        "adapter_accuracy": round(accuracy(adapter_answers), 4),
        "train_tokens_per_s": round(json.loads(version.tags["scores"])["tokens_per_s"], 1),
        "finished_to_first_token_s": round(waited_s, 2),
        "stages_s": story.stages_s,
    }
    write_text(home_folder() / "demo.json", json.dumps(figures, indent=2) + "\n")
    _summarise(figures, config, session, heldout)
    return figures


def _prepare(config: ChatbotConfig) -> Prepared:
    with bar("base model and tokens"):
        data = prepare(config, ensure_model(config.model))
    console.print(f"   {data.num_train} conversations to train on, {data.num_heldout} held out: wordings that training never sees")
    console.print(f"   {data.num_train_tokens:,} tokens, {data.num_loss_tokens:,} of them the assistant's; fingerprint {data.fingerprint}")
    return data


def _train(session: Session, config_file: str, overrides: list[str]) -> Version:
    """Submit the job as a user would and follow its log to the registered version."""
    command = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "train", config_file, *overrides]
    console.print(f"   [dim]$ {' '.join(command)}[/]")
    environment = {**os.environ, **session.environment(), "PYTHONUNBUFFERED": "1"}
    job = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert job.stdout
    lines: list[str] = []
    with bar("sending the job") as update:
        for line in job.stdout:
            lines.append(line.rstrip())
            if step := PROGRESS_LINE.search(line):
                note = line.partition("·")[2].strip()
                update(completed=int(step[1]), total=int(step[2]), note=note, text=f"step {step[1]}/{step[2]}")
                if not console.is_terminal:
                    console.print(f"   {line.strip()}")
            elif line.startswith("train"):
                console.print(f"   [dim]{line.strip()}[/]")
                update(text=line.removeprefix("train").strip())
            elif found := REGISTERED_LINE.search(line):
                # The adapter can be asked for now; the job's own end is not waited for.
                return Registry(session.mlflow_url).find(found[1])
    job.wait()
    tail = "\n".join(f"  {line}" for line in lines[-LAST_LINES:])
    raise RunError("the training job failed", f"last lines of its log:\n{tail}", "mend what they name, then make demo again")


def _show_version(version: Version, session: Session) -> None:
    console.print(f"   [bold]{version.name}[/], made from run {version.run_id}")
    for name in ("base_model", "base_fingerprint", "rank", "data_fingerprint", "config_fingerprint", "git_commit"):
        console.print(f"   [dim]{name:<18}[/] {version.tags.get(name, '')}")
    console.print(f"   {session.mlflow_url}/#/models/{version.chatbot}/versions/{version.number}")


def _ask_both(config: ChatbotConfig, version: Version, heldout: list[Conversation]) -> tuple[list[Answer], list[Answer]]:
    address, answers = endpoint(config), []
    for model in (served_base_name(config.model.name), version.name):
        with bar(f"asking {model}", total=len(heldout)) as update:
            answers.append(ask_all(address, model, heldout, MAX_ANSWER_TOKENS, update))
        console.print(f"   {model}: {accuracy(answers[-1]):.0%} of {len(heldout)} right")
    table = Table("question (held out)", served_base_name(config.model.name), version.name, show_lines=True)
    every = max(1, len(heldout) // NUM_SHOWN)
    for base, adapter in list(zip(*answers, strict=True))[::every][:NUM_SHOWN]:
        asked = question(base.conversation)[-1]["content"]
        table.add_row(asked, _marked(base), _marked(adapter))
    console.print(table)
    return answers[0], answers[1]


def _marked(answer: Answer) -> str:
    mark = "[green]right[/]" if answer.right else "[red]wrong[/]"
    text = " ".join(answer.text.split()).replace("[", r"\[")
    return f"{mark}  {text[:160]}{'…' if len(text) > 160 else ''}"


def _summarise(figures: dict[str, Any], config: ChatbotConfig, session: Session, heldout: list[Conversation]) -> None:
    table = Table("what", "figure", title="\nThe whole job", title_justify="left", box=None, pad_edge=False)
    for name, seconds in figures["stages_s"].items():
        table.add_row(f"{name}", f"{seconds:.0f} s")
    table.add_row("[bold]all stages[/]", f"[bold]{sum(figures['stages_s'].values()):.0f} s[/]")
    table.add_row("training speed", f"{figures['train_tokens_per_s']:,.0f} tokens/s")
    table.add_row("held-out answers right, base", f"{figures['base_accuracy']:.0%}")
    table.add_row("held-out answers right, adapter", f"{figures['adapter_accuracy']:.0%}")
    table.add_row("training finished to first token served", f"{figures['finished_to_first_token_s']:.1f} s")
    console.print(table)
    request = {"model": config.name, "messages": [question(heldout[0])[-1]]}
    body = json.dumps(request).replace("'", "'\\''")
    console.print("\nAsk it yourself:\n")
    print(f"curl {figures['endpoint']}/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    console.print(f"\nchat endpoint  {figures['endpoint']}\nMLflow         {session.mlflow_url}\ndashboard      {session.dashboard_url}")
    console.print("to stop        make down")
