"""Submitting to the line of jobs, and the line as a table.

Knows configs and what the line holds. Does not know how a job is run.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from rich.table import Table

from cluster.arbiter import failure_words
from cluster.job_queue import FAILED, LEAVING, PARTS_A_RUN, RUNNING, STANDING, NewJob, Queue, QueuedJob, clock
from cluster.memory import Rows
from cluster.models import check_model, read_model_config
from cluster.plan import ROUND_TOKENS, choose, place_on, require_fit, require_precision
from cluster.rule import RANKS, SERVE
from cluster.session import Session, with_joined
from cluster.shape import read_shape
from configs.errors import ClusterError, ModelError
from configs.loader import chatbot_source, load_chatbot
from configs.schema import ChatbotConfig
from configs.space import load_sweep

NUM_ENDED = 8


def check_job(config: str, overrides: Sequence[str], is_sweep: bool, session: Session | None) -> NewJob:
    """Read what is submitted, and refuse what could never run.

    Raises:
        ConfigError: The config is wrong.
        ModelError: Its base model cannot be had.
        ClusterError: It wants more cards than there are, more memory than they have, or FP8 where one that it may get has none.
    """
    settings = load_sweep(config, overrides) if is_sweep else load_chatbot(config, overrides)
    check_model(settings.model)
    num_cards, memory_gib = 1 if is_sweep else settings.train.num_workers, 0.0
    if session:
        lends = session.lending.enabled
        usable = [card for card in with_joined(session).job_cards if card["pool"] != SERVE or lends]
        if num_cards > len(usable):
            why = f"the cluster has {len(usable)} that training may use; it would wait for ever"
            raise ClusterError(f"train.num_workers={num_cards} wants as many cards", why, f"train.num_workers={max(1, len(usable))}")
        if not is_sweep:  # each trial may change what decides it
            memory_gib = _least_memory_gib(settings, usable, num_cards)
        require_precision(settings, [card for card in usable if float(card["memory-gib"]) >= memory_gib])
    text = yaml.safe_dump(chatbot_source(config, overrides).values, sort_keys=False, allow_unicode=True)
    return NewJob("sweep" if is_sweep else "train", settings.name, text, str(Path.cwd()), num_cards=num_cards, memory_gib=memory_gib)


def _least_memory_gib(config: ChatbotConfig, cards: Sequence[Mapping[str, str]], num_cards: int) -> float:
    """Return the memory of the smallest card on which at least short rows can be trained; 0 where the plan does not know the model."""
    try:
        shape = read_shape(read_model_config(config.model), config.model.name)
    except ModelError:
        return 0.0
    rows = Rows(ROUND_TOKENS, ROUND_TOKENS)
    places = [place_on(card, config) for card in cards]
    places.sort(key=lambda place: place.memory_gib)
    fitting = [place for place in places if choose(shape, config.train, rows, place)]
    if len(fitting) < num_cards:
        require_fit(shape, config, rows, places[-num_cards])
    return min(place.memory_gib for place in fitting)


def queue_table(queue: Queue) -> Table:
    """Show who runs, who waits and why, in the order of the line, and the last that ended."""
    table = Table("job", "kind", "chatbot", "priority", "state", "since", "cards", "reason", box=None, pad_edge=False)
    standing = sorted(
        queue.jobs(*STANDING), key=lambda job: (job.state not in (RUNNING, LEAVING), RANKS[job.kind], -job.priority, job.place)
    )
    ended = [job for job in queue.jobs() if job.state not in STANDING]
    for job in [*standing, *sorted(ended, key=lambda job: -job.since_s)[:NUM_ENDED]]:
        since = time.strftime("%H:%M:%S", time.localtime(job.since_s))
        table.add_row(str(job.id), job.kind, job.chatbot, str(job.priority), job.state, since, ", ".join(job.cards), told(job))
    return table


def told(job: QueuedJob) -> str:
    """Return why a job is in its state, and of one that runs how far it is."""
    parts = [job.reason or "not looked at yet"]
    if job.state == FAILED:
        parts.append(f"its last lines: python -m cluster logs system --find '{failure_words(job.id)}'")
    if job.state == RUNNING:
        parts.append(_how_far(job))
    if ends_s := job.ends_s():
        parts.append(f"until about {clock(ends_s)}")
    return " · ".join(part for part in parts if part)


def _how_far(job: QueuedJob) -> str:
    """Return how far a job is: a run in steps, a sweep as a share of what it is likely to train, or where that is not known in runs."""
    if job.kind == "train":
        return f"step {job.step}/{job.num_steps}" if job.num_steps else ""
    if job.num_steps:
        return f"about {job.step / job.num_steps:.0%} of its training"
    return f"{job.step / PARTS_A_RUN:.1f} times a run's training so far" if job.step else ""
