"""Minutes of everything at once on one engine: more adapters than it holds, promotions, killed replicas, quotas that run out.

`PYTHONPATH=. python tests/benchmarks/soak.py [--minutes 15]`. It starts a Tandem of its own with a tiny model, whose versions have each
learnt to say one word: an answer in other words than the version has alone is a wrong one. Ends with status 1 if there was any,
or a failure that no kill explains.
"""

import argparse
import contextlib
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import httpx
import openai
import psutil
from bench import write_result

from cluster.home import BYTES_PER_GIB
from configs.cli import console
from tests.ray.stack import Stack, make_config, make_tiny_model, own_stack, wait_for

WORDS = ("red", "blue", "green", "black", "white", "brown")
HELD = {"serve.max_loras": 2, "serve.max_cpu_loras": 3}  # fewer than there are words
NUM_ASKING = 6
CHANGE_EVERY_S = 10.0
KILLS_AT = (0.2, 0.45)  # shares of the time; the second half is for memory alone
QUESTION = "What is number 3?"
TITLES = ("ServeReplica", "EngineCore", "VLLM::Worker", "mlflow", "haproxy")


@dataclass
class Soak:
    """What is asked, and what came of it."""

    stack: Stack
    secret: str
    words: dict[str, str]
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    known_s: list[float] = field(default_factory=list)
    back_s: list[float] = field(default_factory=list)
    memory_gib: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    """When, and how much each kind of process had."""
    killed: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def judge(self, name: str, spoke: str, said: str) -> None:
        """Count an answer; it is wrong if it comes from a version that was not asked, or in another's words."""
        right = spoke in self.words and said == self.words[spoke] and name in (spoke, "speaker")
        self.counts["answers"] += 1
        if not right:
            self.wrong.append(f"{name}: {spoke} said {said!r}")

    def fail(self, what: str) -> None:
        """Count what did not work; while an engine is gone, that is what is to be expected."""
        self.counts["while_killed" if self.killed.is_set() else "failed"] += 1
        if not self.killed.is_set():
            self.failed.append(what)

    def ask_whole(self) -> None:
        """Ask some version, or whichever is live."""
        name = random.choice([*self.words, "speaker"])
        try:
            answer = self.stack.ask(name, QUESTION, secret=self.secret, max_tokens=16)
        except httpx.HTTPError as error:
            self.fail(repr(error))
            return
        if answer.status_code == 200:
            self.judge(name, answer.headers["x-tandem-model"], answer.json()["choices"][0]["message"]["content"])
        else:
            self.fail(f"{answer.status_code} {answer.text}")
            time.sleep(1)

    def ask_streamed(self) -> None:
        """The same as a stream, with the official client."""
        name = random.choice(list(self.words))
        client = openai.OpenAI(base_url=self.stack.endpoint, api_key=self.secret, max_retries=0, timeout=120)
        try:
            messages = [{"role": "user", "content": QUESTION}]
            stream = client.chat.completions.create(model=name, messages=messages, max_tokens=16, temperature=0, stream=True)
            pieces = list(stream)
        except (openai.OpenAIError, httpx.HTTPError) as error:
            self.fail(repr(error))
            time.sleep(1)
            return
        self.counts["streams"] += 1
        said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        self.judge(name, pieces[-1].model, said)

    def ask_beyond_the_quota(self, secret: str) -> None:
        """Ask with a key that may ask little: 429 says when to try again."""
        name = next(iter(self.words))
        try:
            answer = self.stack.ask(name, QUESTION, secret=secret, max_tokens=16)
        except httpx.HTTPError as error:
            self.fail(repr(error))
            return
        if answer.status_code == 429 and answer.headers["retry-after"]:
            self.counts["quota_hits"] += 1
        elif answer.status_code != 200:
            self.fail(f"{answer.status_code} {answer.text}")
        time.sleep(0.5)

    def meaning(self) -> str | None:
        """The version that is live to the replica, if it knows of one."""
        headers = {"Authorization": f"Bearer {self.secret}"}
        listed = httpx.get(f"{self.stack.endpoint}/models", headers=headers, timeout=60).json()["data"]
        return next((model["root"] for model in listed if model["id"] == "speaker"), None)

    def promote(self) -> None:
        """Make another version live, and see when the replica knows."""
        wanted = random.choice(list(self.words))
        num_killed, undisturbed = len(self.back_s), not self.killed.is_set()
        self.stack.registry.promote(wanted)
        began_s = time.monotonic()
        try:
            wait_for(lambda: self.meaning() == wanted, timeout_s=60)
        except (httpx.HTTPError, KeyError, ValueError) as error:
            self.fail(f"promotion: {error!r}")
        else:
            if undisturbed and not self.killed.is_set() and len(self.back_s) == num_killed:
                self.known_s.append(time.monotonic() - began_s)
        self.counts["promotions"] += 1
        time.sleep(CHANGE_EVERY_S)

    def kill(self) -> None:
        """Kill the replica, and see when it answers again."""
        self.killed.set()
        for replica in self.stack.workers("ServeReplica"):
            replica.kill()
        began_s = time.monotonic()
        wait_for(self._answers, timeout_s=300)
        self.back_s.append(time.monotonic() - began_s)
        time.sleep(5)  # what was cut off is told by now
        self.killed.clear()

    def _answers(self) -> bool:
        try:
            return self.stack.ask(next(iter(self.words)), QUESTION, secret=self.secret).status_code == 200
        except httpx.HTTPError:
            return False

    def weigh(self) -> None:
        """Note the memory of all of the stack's processes, by title; shared pages are counted once."""
        found: Counter[str] = Counter()
        for process in self.stack.workers(""):
            with contextlib.suppress(psutil.Error):
                title = next((known for known in TITLES if known in " ".join(process.cmdline())), "others")
                found[title] += process.memory_full_info().pss / BYTES_PER_GIB
        self.memory_gib.append((time.monotonic(), dict(found)))
        time.sleep(5)


@contextmanager
def served() -> Iterator[tuple[Stack, Path]]:
    """A Tandem of its own, with an engine that is up."""
    folder = Path(tempfile.mkdtemp(prefix="tandem-soak-"))
    with own_stack(folder) as stack:
        config = make_config(folder, make_tiny_model(folder / "tiny-model"), stack.ports["chat"])
        stack.serve(config, *(f"{name}={value}" for name, value in HELD.items()))
        yield stack, config


def run(soak: Soak, few: str, length_s: float) -> None:
    """Do everything at once until the time is over."""

    def again(step: Callable[[], None]) -> None:
        while not soak.over.is_set():
            try:
                step()
            except Exception as error:  # whatever it is, it is to be in the result
                soak.fail(repr(error))

    steps = [*[soak.ask_whole] * NUM_ASKING, soak.ask_streamed, lambda: soak.ask_beyond_the_quota(few), soak.promote, soak.weigh]
    threads = [threading.Thread(target=again, args=(step,)) for step in steps]
    began_s = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        for share in KILLS_AT:
            time.sleep(max(0.0, began_s + share * length_s - time.monotonic()))
            soak.kill()
            console.print(f"killed; answered again after {soak.back_s[-1]:.1f} s; {dict(soak.counts)}")
        time.sleep(max(0.0, began_s + length_s - time.monotonic()))
    finally:
        soak.over.set()
        for thread in threads:
            thread.join()


def figures_of(soak: Soak, length_s: float) -> dict[str, float]:
    """Return the result's figures; memory is that of the third and the last quarter, in which nothing was killed."""
    end_s = soak.memory_gib[-1][0]
    quarters = [[found for at_s, found in soak.memory_gib if low <= (end_s - at_s) / length_s < low + 0.25] for low in (0.25, 0.0)]
    memory = {
        f"{title}_{quarter}_quarter_gib": mean(found.get(title, 0.0) for found in samples)
        for title in (*TITLES, "others")
        for quarter, samples in zip(("third", "last"), quarters, strict=True)
    }
    names = ("answers", "streams", "promotions", "quota_hits", "while_killed", "failed")
    return {
        "minutes": length_s / 60,
        "num_wrong": len(soak.wrong),
        **{f"num_{name}": soak.counts[name] for name in names},
        "change_known_median_s": median(soak.known_s),
        "change_known_max_s": max(soak.known_s),
        "killed_to_answer_max_s": max(soak.back_s),
        "memory_third_quarter_gib": mean(sum(found.values()) for found in quarters[0]),
        "memory_last_quarter_gib": mean(sum(found.values()) for found in quarters[1]),
        **{f"memory_{name}": gib for name, gib in memory.items()},
    }


def main() -> int:
    """Soak, write the result, and return 1 if an answer was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    length_s = parser.parse_args().minutes * 60
    with served() as (stack, config):
        versions = [stack.train_speaker(config, word)[0] for word in WORDS]
        secret = stack.make_key("soak")
        # What each says alone: not all learn their word to the letter.
        words = {name: stack.ask(name, QUESTION, secret, max_tokens=16).json()["choices"][0]["message"]["content"] for name in versions}
        if len(set(words.values())) < len(words):
            raise SystemExit(f"two versions say the same: {words}")
        soak = Soak(stack, secret, words)
        stack.registry.promote(next(iter(soak.words)))
        wait_for(lambda: soak.meaning() in soak.words)
        run(soak, stack.make_key("few", "--rpm", "3"), length_s)
    for line in [*soak.wrong[:10], *soak.failed[:10]]:
        console.print(line, markup=False)
    write_result("soak", figures_of(soak, length_s), {"adapters": len(WORDS), **HELD, "clients": NUM_ASKING + 2})
    return 1 if soak.wrong or soak.failed else 0


if __name__ == "__main__":
    sys.exit(main())
