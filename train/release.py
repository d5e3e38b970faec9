"""From a finished version to a decision: evaluate, weigh, let in or not, and write down why.

Knows the order of things and the registry. Does not know how an answer is measured.
"""

import json
from dataclasses import dataclass

from cluster.decisions import note_decision
from cluster.home import OWNER_ONLY, write_text
from cluster.registry import LIVE, Registry, Version, evaluation_page
from cluster.standing import CANARY
from configs.errors import RegistryError, RunError
from configs.schema import ChatbotConfig
from data.ask import first_token_of, own_endpoint
from train.contenders import Say
from train.evaluate import Evaluation, evaluate
from train.gate import NOTHING_LIVE, OTHER_BASE, Decision, decide
from train.record import keep_scores
from train.report_page import page
from train.watch import Outcome, Watched, watch

PASSED, FAILED, TAKEN_BACK = "passed", "failed", "taken back"
WATCHED_BESIDE = "watched_beside"


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

    A version whose watch was cut off, by a kill say, is measured and watched again.

    Raises:
        TandemError: As for `measure`, or another version went live meanwhile; the version is then not let in.
    """
    unwatched = _watch_cut_off(registry, version)
    if LIVE in version.aliases and not unwatched:
        why = "the gate is for versions that are to be let in"
        raise RegistryError(f"{version.name} is live already", why, f"python -m train evaluate {version.name}")
    live = unwatched or _other_live(registry, version)
    is_comparable = live is not None and live.tags.get("base_fingerprint") == version.tags.get("base_fingerprint")
    if live and not is_comparable:
        _say_other_base(config, live, version, say)
    if not unwatched:
        registry.nominate(version.name)
    found = measure(config, registry, version, live if is_comparable else None, say)
    decision = decide(config.gate, found.own.scores, found.differences if is_comparable else OTHER_BASE if live else NOTHING_LIVE)
    if not unwatched:
        _require_still_live(registry, version, live)
    registry.note(version, {"gate": PASSED if decision.passed else FAILED, "gate_decision": json.dumps(decision.to_dict())})
    note_decision(version.chatbot, version.name, PASSED if decision.passed else FAILED)
    for check in decision.checks:
        say(f"gate {'holds' if check.passed else 'fails'}: {check}")
    if not decision.passed:
        if unwatched:
            _take_back(registry, version, unwatched)
        return Release(found, decision)
    first_token_s = None if unwatched else _let_in(config, registry, version, live, found)
    watched = _watch(config, registry, Pair(version, live), found, say) if live and is_comparable and config.gate.watch.minutes else None
    return Release(found, decision, first_token_s, watched)


@dataclass(frozen=True)
class Pair:
    """A version that was let in, and the one that was live before."""

    new: Version
    old: Version


def _watch_cut_off(registry: Registry, version: Version) -> Version | None:
    """Return the version that this one was watched beside, where that watch did not come to its end and this one still answers."""
    beside = json.loads(version.tags.get("watch", "{}")).get(WATCHED_BESIDE)
    return registry.find(beside) if beside and {LIVE, CANARY} & set(version.aliases) else None


def _other_live(registry: Registry, version: Version) -> Version | None:
    live = registry.live(version.chatbot)
    return None if live is None or live.number == version.number else live


def _say_other_base(config: ChatbotConfig, live: Version, version: Version, say: Say) -> None:
    """Say that nothing can be compared with what is live; refuse a canary, whose two versions one engine would have to serve."""
    if config.gate.action == "canary":
        why = f"it was made for another base model than {live.name}, which is live; one engine serves one base"
        raise RegistryError(f"{version.name} cannot be a canary", why, "gate.action=promote")
    say(f"{live.name}, which is live, was made for another base model; {version.name} is compared with its base instead")


def _require_still_live(registry: Registry, version: Version, live: Version | None) -> None:
    now = _other_live(registry, version)
    if (now and now.number) != (live and live.number):
        what = f"{version.name} is not let in: {now.name if now else 'nothing'} is live now"
        why = f"it was compared with {live.name}" if live else "nothing was live when it was measured"
        raise RegistryError(what, why, f"python -m train evaluate {version.name} --promote")


def _let_in(config: ChatbotConfig, registry: Registry, version: Version, live: Version | None, found: Evaluation) -> float | None:
    """Promote, or begin a canary where something is live beside it; return when the live version's first token came.

    Raises:
        RunError: It does not answer; what was live is live again.
    """
    if config.gate.action == "canary" and live:
        registry.canary(version.name, config.gate.canary_share)
        return None
    registry.promote(version.name)
    try:
        return first_token_of(own_endpoint(config.serve), version.chatbot, version.name, found.own.answers[0].conversation).came_s
    except RunError:
        if live:
            _take_back(registry, version, live)
        raise


def _watch(config: ChatbotConfig, registry: Registry, pair: Pair, found: Evaluation, say: Say) -> Outcome:
    """Watch a version that was let in; where it is worse than the one that was live, take it back."""
    # First: a job that is killed meanwhile must not leave a version that looks as if it had held.
    registry.note(pair.new, {"watch": json.dumps({WATCHED_BESIDE: pair.old.name})})
    asked = [answer.conversation for answer in found.own.answers]
    outcome = watch(config.gate.watch, Watched(own_endpoint(config.serve), pair.new.name, pair.old.name, asked), say)
    if outcome.reasons:
        _take_back(registry, pair.new, pair.old)
        say(f"taken back: {'; '.join(outcome.reasons)}")
    elif not outcome.is_enough:
        say(f"{len(outcome.new.probes)} answers came while it was watched: too few to judge errors and latency by")
    registry.note(pair.new, {"watch": json.dumps(outcome.to_dict())})
    return outcome


def _take_back(registry: Registry, version: Version, live: Version) -> None:
    now = registry.find(version.name)
    if CANARY in now.aliases:
        registry.rollback(version.chatbot)
    elif LIVE in now.aliases:  # else somebody was quicker
        registry.promote(live.name)
    registry.note(version, {"gate": TAKEN_BACK})
    note_decision(version.chatbot, version.name, TAKEN_BACK)
