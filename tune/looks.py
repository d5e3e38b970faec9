"""What a trial tells of itself: its looks so far, or why it failed.

Knows the shape of a trial's result. Does not know who makes or reads it.
"""

import json
import math
from pathlib import Path
from typing import Any

REASON = "reason"
TRIAL, SETTINGS = "trial", "settings"  # of a result: who trained what it tells of, and with what; PBT hands results on
Looks = list[dict[str, float]]


def read_looks(checkpoint: Path) -> Looks:
    """Return every look of a run from its checkpoint: step, share of the run, tokens so far, loss and held-out loss."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    looks: Looks = []
    loss = math.nan
    for entry in state["log_history"]:
        loss = entry.get("loss", loss)
        if "eval_loss" in entry:
            looks.append(
                {
                    "step": entry["step"],
                    "share": entry["step"] / state["max_steps"],
                    "num_tokens": entry["num_input_tokens_seen"],
                    "loss": loss,
                    "eval_loss": entry["eval_loss"],
                }
            )
    return looks


def newest_tokens(looks: Looks) -> float:
    """Return the tokens from the look before the last to the last: each start is from a look, and each report is of one."""
    before = looks[-2]["num_tokens"] if len(looks) > 1 else 0
    return looks[-1]["num_tokens"] - before


def failure(reason: str, metric: str, mode: str) -> dict[str, Any]:
    """Make the result of a trial that cannot be trained: the worst score, and why."""
    return {metric: math.inf if mode == "min" else -math.inf, REASON: reason}


def failed(result: dict[str, Any]) -> bool:
    """Whether a result is that of a trial that cannot be trained."""
    return REASON in result
