"""Measures a card of this machine: some steps of the real training, in a process of its own, with made-up weights.

Knows how to ask `train.probe`, and how its figures become a rate. Does not import it: the cluster knows nothing of losses.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.cards import Card
from cluster.memory import Step
from cluster.placement import num_threads
from cluster.rates import Rate, overhead, step_flops
from configs.errors import ClusterError, last_lines
from configs.loader import ROOT
from configs.schema import ChatbotConfig

PROBE = "train.probe"
TIMEOUT_S = 900


@dataclass(frozen=True)
class Measured:
    """What some steps of training took on a card."""

    tokens_per_s: float
    taken_gib: float

    def rate(self, step: Step) -> Rate:
        """Return the card's rate, as the step that was measured shows it."""
        step_s = step.num_tokens / self.tokens_per_s
        return Rate(step_flops(step) / step_s * overhead(step), source="measured now", precision=step.train.precision)


def measure_card(card: Card, config: ChatbotConfig, model: Mapping[str, Any]) -> Measured:
    """Train some steps on a card; the config's size is settled, and `model` is the base's config.json.

    Raises:
        ClusterError: They failed, such as for want of memory that others hold.
    """
    asked = json.dumps({"config": config.model_dump(mode="json"), "model": dict(model)})
    threads = num_threads(card.labels, config.train.num_workers)  # as a run has them
    place = {"CUDA_VISIBLE_DEVICES": card.gpu.index if card.gpu else "", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    ask = partial(subprocess.run, input=asked, capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT_S, check=False)
    try:
        done = ask(card.kept_to_cores([sys.executable, "-m", PROBE]), env={**os.environ, **place})
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{card.name} was not measured", f"its steps took over {TIMEOUT_S} s", "leave out --measure") from None
    if done.returncode:
        remedy = "end what else runs on the card, or leave out --measure"
        raise ClusterError(f"{card.name} was not measured", last_lines(done.stderr), remedy)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return Measured(found["tokens_per_s"], found["taken_gib"])
