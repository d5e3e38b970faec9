"""A whole Tandem of its own for tests: own home, own ports, started and ended through the command line."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.cards import find_gpus
from cluster.parts import ray_folder
from cluster.processes import Process, quiet_port
from cluster.registry import Registry, Version
from cluster.session import operator_key
from configs.loader import ROOT
from tests.helpers.data import chat, tokenizer_folder, write_rows
from tests.helpers.environment import users_environment
from tests.helpers.leaks import files_in, leaks

SHELLS = ("sh", "bash", "dash")
REGISTERED = re.compile(r"registered as (\S+);")
HUB_TOKEN, JUDGE_KEY, FEEDBACK_PASSWORD = (f"{what}-that-no-log-may-have" for what in ("hub-token", "judge-key", "password"))
ROW, QUESTION = "What is number", "How do I start"  # what is trained and asked begins so, and nothing else has these words
RUN_ID = re.compile(r"run ([0-9a-f]{32})")


@dataclass
class Stack:
    """One running Tandem."""

    home: Path
    folder: Path
    ports: dict[str, int]
    keys: dict[str, str] = field(default_factory=dict)
    """The secrets of the keys that were made, by the name of each."""
    gpus: Sequence[str] = ()
    """The GPUs that it may have, all if empty."""

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a user's shell: nothing of the developer's own, and secrets."""
        mine = users_environment()
        # With two clusters on the same cores, a thread that waits must not spin.
        patient = {"OMP_WAIT_POLICY": "passive"} if "PYTEST_XDIST_WORKER" in os.environ else {}
        # The usual database; SQLite passes over parameters that it does not know.
        feedback_url = f"sqlite:///file:{self.home}/feedback.db?uri=true&password={FEEDBACK_PASSWORD}"
        secrets = {"HUGGINGFACE_TOKEN": HUB_TOKEN, "JUDGE_API_KEY": JUDGE_KEY, "FEEDBACK_URL": feedback_url}
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}
        return {**mine, **patient, **secrets, **visible, "TANDEM_HOME": str(self.home), "COLUMNS": "200"}

    @property
    def planted(self) -> dict[str, str]:
        """What no log may have, by what it is."""
        token = self.home / "ray_token"
        made = {"the cluster's token": token.read_text().strip(), "the operator's key": str(operator_key(token))}
        given = {"the hub's token": HUB_TOKEN, "the judge's key": JUDGE_KEY, "the feedback's password": FEEDBACK_PASSWORD}
        keys = {f"the key of {name}": key for name, key in self.keys.items()}
        return {**made, **given, **keys, "a row": ROW, "a question": QUESTION}

    @property
    def logs(self) -> list[Path]:
        """Our logs, and Ray's."""
        return files_in([self.home / "logs", *ray_folder().glob("session_2*/logs")])

    @property
    def job_environment(self) -> dict[str, str]:
        """The same, after `source .tandem/env`."""
        lines = (line.removeprefix("export ").partition("=") for line in (self.home / "env").read_text().splitlines())
        exports = {key: value.strip("'") for key, _, value in lines if key != "PATH"}
        return {**self.environment, **exports, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(self, *words: str, timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
        """Run `python -m WORDS`."""
        command = [sys.executable, "-m", *words]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False)

    def begin(self, *words: str, job: bool = False) -> subprocess.Popen[str]:
        """Start `python -m WORDS`, or any command as a job's submitter would."""
        command = list(words) if job else [sys.executable, "-m", *words]
        environment = self.job_environment if job else self.environment
        environment["PYTHONUNBUFFERED"] = "1"
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def up(self) -> subprocess.CompletedProcess[str]:
        """Start a card for each GPU, or without one a serve card and two train cards."""
        machine = [f"{name}={port}" for name, port in self.ports.items() if name != "chat"]
        cards = [] if find_gpus() else ["cards=[{pool: serve}, {pool: train}, {pool: train}]"]
        lending = "lending={enabled: true, quiet_after_s: 5, idle_engine: sleep, min_hold_s: 0}"
        return self.run("cluster", "up", "auto", *cards, *machine, lending)

    @property
    def registry(self) -> Registry:
        return Registry(f"http://127.0.0.1:{self.ports['mlflow_port']}")

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.ports['dashboard_port']}"

    @property
    def dashboard_door(self) -> dict[str, str]:
        """The header that opens the dashboard and the job API."""
        return {"Authorization": f"Bearer {(self.home / 'ray_token').read_text()}"}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['chat']}/v1"

    def train(self, config: Path, *overrides: str) -> Version:
        """Train to the end, and return the version."""
        done = self.run("train", str(config), *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
        return self._told(done.stdout)

    def train_as_job(self, config: Path, *overrides: str) -> Version:
        """The same, as a Ray job."""
        command = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "train", str(config), *overrides]
        job = self.begin(*command, job=True)
        said, _ = job.communicate(timeout=300)
        assert job.returncode == 0, said
        return self._told(said)

    def _told(self, said: str) -> Version:
        """The version that a training says it registered."""
        registered, run_id = REGISTERED.search(said), RUN_ID.search(said)
        assert registered, said
        assert run_id, said
        version = self.registry.find(registered[1])
        assert version.run_id == run_id[1]
        return version

    def stop_job(self, submission: str) -> None:
        """Stop a Ray job as `ray job stop` does, without the seconds in which that starts."""
        asked = httpx.post(f"{self.dashboard}/api/jobs/{submission}/stop", headers=self.dashboard_door, timeout=30)
        assert asked.json() == {"stopped": True}

    def train_speaker(self, config: Path, word: str) -> tuple[str, str]:
        """Train a version that says who it is, whatever it is asked; return its name and its words."""
        said = f"I am {word}."
        rows = [chat(f"{ROW} {number}?", said, split="heldout" if number % 8 == 0 else "train") for number in range(64)]
        source = write_rows(self.folder / f"{word}.jsonl", rows)
        settings = ("train.max_steps=60", "train.checkpoint_every_steps=60", "train.lora.rank=8")
        return self.train(config, "name=speaker", f"data.source={source}", *settings).name, said

    def serve(self, config: Path, *overrides: str) -> None:
        """Serve, and wait until the engine is up."""
        done = self.run("serve", str(config), *overrides, timeout_s=600)
        assert done.returncode == 0, done.stdout + done.stderr

    def losses(self, run_id: str) -> dict[int, float]:
        return losses_of(self.registry.client, run_id)

    def workers(self, title: str) -> list[psutil.Process]:
        """This stack's own Ray processes of a title."""
        session = json.loads((self.home / "cluster.json").read_text())
        family = [member for entry in session["processes"] for member in Process(**entry).family()]
        return [member for member in family if title in " ".join(_cmdline(member))]

    def parts(self, name: str, words: str = "") -> list[psutil.Process]:
        """This stack's processes by name and by what their command line says; some may end meanwhile, and shells are none."""
        found = []
        for process in self.workers(words):
            with suppress(psutil.Error):
                found += [process] if name in process.name() and process.name() not in SHELLS else []
        return found

    def make_key(self, name: str, *settings: str) -> str:
        """Make a key through the command line, and return its secret."""
        made = self.run("serve", "keys", "create", name, *settings)
        assert made.returncode == 0, made.stderr
        self.keys[name] = made.stdout.split()[1]
        return self.keys[name]

    def ask(
        self, model: str, text: str = f"{QUESTION}?", secret: str | None = None, timeout_s: float = 120, **settings: Any
    ) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **settings}
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        return httpx.post(f"{self.endpoint}/chat/completions", json=body, headers=headers, timeout=timeout_s)


@contextmanager
def own_stack(folder: Path) -> Iterator[Stack]:
    """Start a Tandem in a folder, and end it afterwards; nothing of what is secret may be in its logs then."""
    stack = Stack(folder / "home", folder, {name: quiet_port() for name in ("ray_port", "dashboard_port", "mlflow_port", "chat")})
    done = stack.up()
    assert done.returncode == 0, done.stdout + done.stderr
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TANDEM_HOME", str(stack.home))  # for what a test does with the registry itself
        try:
            yield stack
        finally:
            done = stack.run("cluster", "down")
            assert done.returncode == 0, done.stdout + done.stderr
            assert leaks(stack.logs, stack.planted) == []


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def losses_of(client: Any, run_id: str) -> dict[int, float]:
    """The loss of each step of a run; where a step was done twice, that of the last time."""
    history = client.get_metric_history(run_id, "loss")
    return {metric.step: metric.value for metric in sorted(history, key=lambda metric: metric.timestamp)}


def wait_for(what: Callable[[], Any], timeout_s: float = 120) -> Any:
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)
    return found


def make_tiny_model(folder: Path) -> Path:
    """A Llama of two layers with random weights: for everything in which quality does not matter."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer_folder()
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


def make_config(folder: Path, model: Path, chat_port: int) -> Path:
    """A chatbot on the tiny model, with rows enough for some dozen steps.

    A run has one checkpoint, its last: Ray Train takes two a second at most, however short the steps are.
    """
    rows = [chat(f"{ROW} {number}?", f"It is {number * 7 % 100}.", split="heldout" if number % 8 == 0 else "train") for number in range(64)]
    source = write_rows(folder / "rows.jsonl", rows)
    config = folder / "tiny.yaml"
    config.write_text(
        f"name: tiny\nmodel: {{name: {model}}}\n"
        f"data: {{source: {source}, split: marked, max_length_tokens: 128, system_prompt: Be brief.}}\n"
        "train: {lora: {rank: 4, alpha: 8}, learning_rate: 5.0e-3, batch_size: 4, max_steps: 8, log_every_steps: 1,\n"
        "        checkpoint_every_steps: 8}\n"
        f"serve: {{port: {chat_port}, max_model_len_tokens: 256, max_lora_rank: 8, max_loras: 2, max_num_seqs: 8,\n"
        "        tool_parser: hermes, max_answer_tokens: 96, feedback: {keep_conversations: true},\n"
        "        scaling: {use_train_cards: true}}\n"
    )
    return config
