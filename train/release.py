"""From a finished version to a decision: evaluate, weigh, let in or not, and write down why.

Knows the order of things and the registry. Does not know how an answer is measured.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.home import home_folder, write_text
from cluster.registry import Registry, Version, mlflow_errors
from configs.errors import RunError
from configs.schema import ChatbotConfig
from data.ask import first_token, own_endpoint
from train.evaluate import Evaluation, evaluate
from train.gate import Decision, decide
from train.report_page import page, summary
from train.scores import shown_interval
from train.watch import Outcome, watch

Say = Callable[[str], None]
OWNER_ONLY = 0o600  # answers to people's questions may be in it
LIVE_TIMEOUT_S = 30.0
RETRY_S = 0.1
PASSED, FAILED, TAKEN_BACK = "passed", "failed", "taken back"


@dataclass(frozen=True)
class Release:
    """What became of a version: how it was measured, decided and, where it was watched, held."""

    evaluation: Evaluation
    decision: Decision
    first_token_s: float | None = None
    """Time of day at which the version's first token came by the chatbot's name, where it was made live."""
    watched: Outcome | None = None

    @property
    def is_in(self) -> bool:
        """Whether the version is live or a canary now."""
        return self.decision.passed and not (self.watched and self.watched.reasons)

    @property
    def finished_to_live_s(self) -> float | None:
        """Seconds from the last training step to the first token of the live version, besides the evaluation itself."""
        if self.first_token_s is None:
            return None
        return self.first_token_s - float(self.evaluation.version.tags["finished_s"]) - self.evaluation.duration_s


def measure(config: ChatbotConfig, registry: Registry, version: Version, against: Version | None, say: Say) -> Evaluation:
    """Evaluate a version; write the scores to its run and its tags, and a page with the answers to the run and the home folder.

    Raises:
        TandemError: As for `evaluate`, or MLflow does not answer.
    """
    found = evaluate(config, registry, version, against, say)
    file = home_folder() / "evaluations" / f"{version.chatbot}-{version.number}.html"
    text = page(found)
    write_text(file, text, OWNER_ONLY)
    keep_scores(registry, version, found.own.scores, found.differences, text)
    say(f"answers side by side: {file}")
    return found


def release(config: ChatbotConfig, registry: Registry, version: Version, say: Say) -> Release:
    """Measure a version against the live one, hold it against the gate, and let it in if it passes; it stays the candidate if not.

    Raises:
        TandemError: As for `measure`; the version then stays the candidate.
    """
    registry.nominate(version.name)
    live = _comparable_live(registry, version, say)
    found = measure(config, registry, version, live, say)
    decision = decide(config.gate, found.own.scores, found.differences if live else None)
    registry.note(version, {"gate": PASSED if decision.passed else FAILED, "gate_decision": json.dumps(decision.to_dict())})
    for check in decision.checks:
        say(f"gate {'holds' if check.passed else 'fails'}: {check}")
    if not decision.passed:
        return Release(found, decision)
    first_token_s = _let_in(config, registry, version, live, found)
    watched = _watch(config, registry, version, live, found) if live and config.gate.watch.minutes else None
    return Release(found, decision, first_token_s, watched)


def _comparable_live(registry: Registry, version: Version, say: Say) -> Version | None:
    live = registry.live(version.chatbot)
    if live is None or live.number == version.number:
        return None
    if live.tags.get("base_fingerprint") != version.tags.get("base_fingerprint"):
        say(f"{live.name}, which is live, was made for another base model; {version.name} is compared with its base instead")
        return None
    return live
