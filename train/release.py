"""From a finished version to a decision: evaluate, weigh, let in or not, and write down why.

Knows the order of things and the registry. Does not know how an answer is measured.
"""

import json
import time
from dataclasses import dataclass

from cluster.home import OWNER_ONLY, write_text
from cluster.registry import CANARY, LIVE, Registry, Version, evaluation_page
from configs.errors import RegistryError, RunError
from configs.schema import ChatbotConfig
from data.ask import first_token, own_endpoint
from train.contenders import Say
from train.evaluate import Evaluation, evaluate
from train.gate import Decision, decide
from train.record import keep_scores
from train.report_page import page
from train.watch import Outcome, Watched, watch

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
    file, text = evaluation_page(version), page(found)
    write_text(file, text, OWNER_ONLY)
    keep_scores(registry, version, found.own.scores, found.differences, text)
    say(f"answers side by side: {file}")
    return found


def release(config: ChatbotConfig, registry: Registry, version: Version, say: Say) -> Release:
    """Measure a version against the live one, hold it against the gate, and let it in if it passes; it stays the candidate if not.

    Raises:
        TandemError: As for `measure`; the version then stays the candidate.
    """
    if LIVE in version.aliases:
        raise RegistryError(
            f"{version.name} is live already", "the gate is for versions that are to be let in", f"python -m train evaluate {version.name}"
        )
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
    watched = _watch(config, registry, version, live, found, say) if live and config.gate.watch.minutes else None
    return Release(found, decision, first_token_s, watched)


def _comparable_live(registry: Registry, version: Version, say: Say) -> Version | None:
    live = registry.live(version.chatbot)
    if live is None or live.number == version.number:
        return None
    if live.tags.get("base_fingerprint") != version.tags.get("base_fingerprint"):
        say(f"{live.name}, which is live, was made for another base model; {version.name} is compared with its base instead")
        return None
    return live


def _let_in(config: ChatbotConfig, registry: Registry, version: Version, live: Version | None, found: Evaluation) -> float | None:
    """Promote, or begin a canary where something is live beside it; return when the live version's first token came."""
    if config.gate.action == "canary" and live:
        registry.canary(version.name, config.gate.canary_share)
        return None
    registry.promote(version.name)
    endpoint, asked = own_endpoint(config.serve), found.own.answers[0].conversation
    deadline = time.monotonic() + LIVE_TIMEOUT_S
    while (first := first_token(endpoint, version.chatbot, asked)).version != version.name:
        if time.monotonic() > deadline:
            why = f"{version.chatbot} is still answered by {first.version}, {LIVE_TIMEOUT_S:.0f} s after the promotion"
            raise RunError(f"{version.name} is live in the registry, and not on the engine", why, "python -m serve status")
        time.sleep(RETRY_S)
    return first.came_s


def _watch(config: ChatbotConfig, registry: Registry, version: Version, live: Version, found: Evaluation, say: Say) -> Outcome:
    """Watch a version that was let in; where it is worse than the one that was live, take it back."""
    asked = [answer.conversation for answer in found.own.answers]
    outcome = watch(config.gate.watch, Watched(own_endpoint(config.serve), version.name, live.name, asked), say)
    registry.note(version, {"watch": json.dumps(outcome.to_dict())})
    if not outcome.reasons:
        return outcome
    now = registry.find(version.name)
    if CANARY in now.aliases:
        registry.rollback(version.chatbot)
    elif LIVE in now.aliases:  # else somebody was quicker
        registry.promote(live.name)
    registry.note(version, {"gate": TAKEN_BACK})
    say(f"taken back: {'; '.join(outcome.reasons)}")
    return outcome
