"""What a training process counts for those who watch over a cluster: steps, tokens, losses, and the steps of before that were lost.

Knows MLflow's history of a run. Does not know what a step is.
"""

from collections.abc import Mapping
from typing import Any

from cluster.metrics import EVAL_LOSS, STEPS_LOST, TRAIN_LOSS, TRAIN_STEPS, TRAIN_TOKENS

GAUGES = {"loss": TRAIN_LOSS, "eval_loss": EVAL_LOSS}


class Tally:
    """Counts one run's steps from where this process took it up."""

    def __init__(self, chatbot: str) -> None:
        self.chatbot, self.step, self.num_tokens = chatbot, 0, 0

    def begin(self, step: int, num_tokens: int, last_step: int) -> None:
        """Begin at a checkpoint's step; those after it, up to the last one that was logged, are trained again."""
        self.step, self.num_tokens = step, num_tokens
        STEPS_LOST.add(max(0, last_step - step), chatbot=self.chatbot)

    def count(self, step: int, num_tokens: int) -> None:
        """Count what was done since the last time."""
        TRAIN_STEPS.add(step - self.step, chatbot=self.chatbot)
        TRAIN_TOKENS.add(num_tokens - self.num_tokens, chatbot=self.chatbot)
        self.step, self.num_tokens = step, num_tokens

    def show(self, found: Mapping[str, float]) -> None:
        """Show the newest losses."""
        for name, gauge in GAUGES.items():
            if name in found:
                gauge.set(found[name], chatbot=self.chatbot)


def last_logged_step(client: Any, run_id: str) -> int:
    """Return the last step of a run whose loss is in MLflow, as often as `train.log_every_steps` says; 0 where there is none."""
    return max((metric.step for metric in client.get_metric_history(run_id, "loss")), default=0)
