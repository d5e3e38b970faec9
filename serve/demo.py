"""The whole job, told as a story: cluster, data, fine-tune, registry, serving, live.

Uses the same doors as a user: `ray job submit`, the registry, the OpenAI endpoint. Does not import training.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.home import OWNER_ONLY, home_folder, write_text
from cluster.models import check_model, ensure_model, served_base_name
from cluster.registry import Registry, Version
from cluster.session import Session, token_file
from cluster.stack import start
from configs.cli import console
from configs.errors import RunError, last_lines
from configs.loader import ROOT, load_machine
from configs.schema import ChatbotConfig
from data.ask import Answer, Endpoint, accuracy, ask_all, first_token, first_token_of
from data.conversations import Conversation, question, read_prepared
from data.prepare import Prepared, check_source, prepare
from serve.deploy import deploy, is_running, wait_until_running
from serve.keys import KeyFile

MAX_ANSWER_TOKENS = 48
KEY_NAME = "demo"
KEY_LINE = re.compile(r"^export OPENAI_API_KEY=(\S+)$", re.MULTILINE)
CLIENT_SETTINGS = "client.env"
NUM_SHOWN = 5
PROGRESS_LINE = re.compile(r"step (\d+)/(\d+)")
REGISTERED_LINE = re.compile(r"registered as ([a-z0-9._-]+:\d+)")
JOB_ID = re.compile(r"raysubmit_\w+")
LAST_LINES = 15
LOOK_AT_ENGINE_S = 10


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
    # Twice a second: the default of ten takes CPU from the work that it shows.
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
        task = progress.add_task(text, total=total, note="")

        def update(completed: int | None = None, total: int | None = None, note: str = "", text: str | None = None) -> None:
            step = 1 if completed is None and text is None else None
            progress.update(task, advance=step, completed=completed, total=total, description=text, note=note)

        yield update


def tell(config: ChatbotConfig, config_file: str, overrides: list[str]) -> dict[str, Any]:
    """Run the whole job once and return its figures, which are also written to `demo.json` in the home folder."""
    story, started_s = Story(), time.monotonic()
    check_source(config.data)
    check_model(config.model)
    with story.stage("cluster", "Start the cluster: two cards, MLflow and the dashboard"):
        # The small model is converted once, half a minute that a second core has now.
        with bar("starting") as update, ThreadPoolExecutor(1) as pool:
            model_folder = pool.submit(ensure_model, config.model)
            session = start(load_machine(), lambda step: update(text=step))
        for card in session.cards:
            what = "answers questions" if card["pool"] == "serve" else "trains"
            console.print(f"   {card['card']} ({card['accelerator']}, {card['memory-gib']} GiB) [bold]{what}[/]")
        console.print(f"   MLflow {session.mlflow_url} · dashboard {session.dashboard_url} (token in {token_file()})")
    with story.stage("data", f"Prepare the data: {config.data.source}"):
        data = _prepare(config, model_folder)
    with story.stage(
        "train", f"The serve card loads {config.model.name} on a vLLM engine, while the train card fine-tunes it, as a Ray job"
    ):
        address = deploy(config, session, lambda _: None, wait=False)
        chat = Endpoint(address, _own_key(address))
        version = _train(session, config, config_file, overrides)
    heldout = read_prepared(data.heldout_file)
    with story.stage("register", "The adapter is in the registry, and its first token comes from the engine that is up"):
        with bar("loading the engine") as update:
            wait_until_running(session, lambda words: update(text=words))
        waited_s = first_token(chat, version.name, heldout[0]).came_s - float(version.tags["finished_s"])
        _show_version(version, session)
    with story.stage("ask", "Ask base and adapter the same held-out questions, on the same engine"):
        base_answers, adapter_answers = _ask_both(chat, config, version, heldout)
    with story.stage("live", f"Make {version.name} live"):
        Registry(session.mlflow_url).promote(version.name)
        live = first_token_of(chat, config.name, version.name, heldout[0])
        live_s = live.came_s - float(version.tags["finished_s"]) - story.stages_s["ask"]
        console.print(f"   requests for [bold]{config.name}[/] now go to [bold]{version.name}[/]; the engine did not restart")
    figures = {
        "model": config.name,
        "version": version.name,
        "endpoint": chat.address,
        "api_key": chat.api_key,
        "base_accuracy": round(accuracy(base_answers), 4),
        "adapter_accuracy": round(accuracy(adapter_answers), 4),
        "train_tokens_per_s": round(json.loads(version.tags["scores"])["tokens_per_s"], 1),
        "finished_to_first_token_s": round(waited_s, 2),
        "finished_to_live_s": round(live_s, 2),
        "stages_s": story.stages_s,
        "total_s": round(time.monotonic() - started_s, 1),
    }
    write_text(home_folder() / "demo.json", json.dumps(figures, indent=2) + "\n", OWNER_ONLY)
    _summarise(figures, session, heldout)
    return figures


def _prepare(config: ChatbotConfig, model_folder: "Future[Path]") -> Prepared:
    with bar("base model and tokens"):
        data = prepare(config, model_folder.result())
    console.print(
        f"   {data.num_train} conversations to train on, {data.num_heldout} held out: wordings that training never sees{data.left_out}"
    )
    console.print(f"   {data.num_train_tokens:,} tokens, {data.num_loss_tokens:,} of them the assistant's; fingerprint {data.fingerprint}")
    return data


def _train(session: Session, config: ChatbotConfig, config_file: str, overrides: list[str]) -> Version:
    """Submit the job as a user would and follow its log to the registered version."""
    words = [_reachable(config_file), *overrides, *_absolute_paths(config)]
    command = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "train", *words]
    console.print(f"   [dim]$ {' '.join(command)}[/]")
    environment = {**os.environ, **session.environment(), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as job:
        lines: list[str] = []
        try:
            with bar("sending the job") as update:
                found = _follow(job, lines, update, session)
        except BaseException:
            _stop(lines, environment)
            job.terminate()
            raise
        if found:
            # The adapter can be asked for now; the job's own end is not waited for.
            job.terminate()
            return Registry(session.mlflow_url).find(found)
    why = f"last lines of its log:\n{last_lines(os.linesep.join(lines), LAST_LINES)}"
    raise RunError("the training job failed", why, "mend what they name, then make demo again")


def _follow(job: "subprocess.Popen[str]", lines: list[str], update: Callable[..., None], session: Session) -> str | None:
    """Show progress until the job registers a version or ends; return the version's name."""
    assert job.stdout
    looked_s = time.monotonic()
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
            return found[1]
        if time.monotonic() - looked_s > LOOK_AT_ENGINE_S:
            is_running(session)  # an engine that cannot start is told now, not after hours of training
            looked_s = time.monotonic()
    job.wait()
    return None


def _stop(lines: list[str], environment: dict[str, str]) -> None:
    """End the job that was submitted, so that it does not go on holding the card unseen."""
    if job := next((found[0] for line in lines if (found := JOB_ID.search(line))), None):
        console.print(f"   stopping {job}")
        subprocess.run(["ray", "job", "stop", "--no-wait", job], cwd=ROOT, env=environment, capture_output=True, check=False)


def _absolute_paths(config: ChatbotConfig) -> list[str]:
    """Name local folders and files by their whole paths, where the job's copy of the checkout would not have them."""
    settings = {"model.name": config.model.name, "data.source": config.data.source}
    local = {name: value for name, value in settings.items() if Path(value).expanduser().exists()}
    return [f"{name}={whole}" for name, value in local.items() if (whole := _reachable(value)) != value]


def _reachable(path: str) -> str:
    """Return a path that a job can open: as it is where the file is uploaded with the checkout, else whole."""
    whole = Path(path).expanduser().resolve()
    ignored = subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", str(whole)], capture_output=True, check=False).returncode == 0
    return path if whole.is_relative_to(ROOT) and not ignored and not Path(path).is_absolute() else str(whole)


def _show_version(version: Version, session: Session) -> None:
    console.print(f"   [bold]{version.name}[/], made from run {version.run_id}")
    for name in ("base_model", "base_fingerprint", "rank", "data_fingerprint", "config_fingerprint", "git_commit"):
        console.print(f"   [dim]{name:<18}[/] {version.tags.get(name, '')}")
    console.print(f"   {session.mlflow_url}/#/models/{version.chatbot}/versions/{version.number}")


def _own_key(address: str) -> str:
    """Return the demo's key: that of the last demo while it is valid, or else a new one; kept with the address for `source`."""
    keys, file = KeyFile(), home_folder() / CLIENT_SETTINGS
    known = keys.read()
    said = KEY_LINE.search(file.read_text()) if file.is_file() else None
    last = keys.find(said[1]) if said else None
    if said and last and last.is_valid():
        secret = said[1]
    else:
        if any(key.name == KEY_NAME and key.is_valid() for key in known):
            keys.revoke(KEY_NAME)  # its secret is lost, for only hashes are kept
        secret = keys.create(KEY_NAME)
    # At once: should the demo end early, the endpoint asks for a key that somebody has.
    write_text(file, f"export OPENAI_BASE_URL={address}\nexport OPENAI_API_KEY={secret}\n", OWNER_ONLY)
    return secret


def _ask_both(chat: Endpoint, config: ChatbotConfig, version: Version, heldout: list[Conversation]) -> tuple[list[Answer], list[Answer]]:
    answers = []
    for model in (served_base_name(config.model.name), version.name):
        with bar(f"asking {model}", total=len(heldout)) as update:
            answers.append(ask_all(chat, model, heldout, MAX_ANSWER_TOKENS, update))
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


def _summarise(figures: dict[str, Any], session: Session, heldout: list[Conversation]) -> None:
    table = Table("what", "figure", title="\nThe whole job", title_justify="left", box=None, pad_edge=False)
    for name, seconds in figures["stages_s"].items():
        table.add_row(f"{name}", f"{seconds:.0f} s")
    table.add_row("[bold]all stages[/]", f"[bold]{figures['total_s']:.0f} s[/]")
    table.add_row("training speed", f"{figures['train_tokens_per_s']:,.0f} tokens/s")
    table.add_row("held-out answers right, base", f"{figures['base_accuracy']:.0%}")
    table.add_row("held-out answers right, adapter", f"{figures['adapter_accuracy']:.0%}")
    table.add_row("training finished to first token served", f"{figures['finished_to_first_token_s']:.1f} s")
    table.add_row("the same, of the live version by its name, without the questions before", f"{figures['finished_to_live_s']:.1f} s")
    console.print(table)
    request = {"model": figures["model"], "messages": [question(heldout[0])[-1]]}
    body = json.dumps(request).replace("'", "'\\''")
    console.print("\nAsk it yourself:\n")
    key = f"-H 'Authorization: Bearer {figures['api_key']}'"
    print(f"curl -s {figures['endpoint']}/chat/completions {key} -H 'Content-Type: application/json' -d '{body}'")
    console.print(f"\nfor OpenAI's clients: source {home_folder() / CLIENT_SETTINGS}", soft_wrap=True)
    console.print(f"\nchat endpoint  {figures['endpoint']}\nMLflow         {session.mlflow_url}\ndashboard      {session.dashboard_url}")
    console.print("to stop        make down")
