"""Measures a version on the very engine that serves it, beside another version or the base.

Knows what is asked and of whom. Does not know how an interval is made, what a gate wants, or how a result looks.
"""

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.home import home_folder
from cluster.models import check_model, ensure_model, served_base_name
from cluster.registry import MANIFEST_FILE, Registry, Version
from configs.errors import DataError, RunError
from configs.loader import find_file
from configs.schema import ChatbotConfig, DataConfig
from data.ask import Endpoint, own_endpoint, served_models
from data.conversations import Conversation, read_prepared
from data.formats import read_conversations
from data.prepare import bad_rows_error, check_source, prepare
from data.template import load_tokenizer
from train.contenders import Contender, Desk, Measured, Say, spread, with_forgotten, with_sample
from train.judge import Verdict, read_rubric, sample_of
from train.lm_tasks import require_lm_eval, run_tasks
from train.scores import ACCURACY, Interval, compare_all

SERVED_AS = {"none": "the base in full", "fp8": "the base in 8 bit (fp8)", "bitsandbytes": "the base in 4 bit (nf4)"}
FP8_BY_ROWS = "fp8 by rows"  # training's: the engine's fp8 has one scale for a whole weight, and so other numbers
TRAINED_ON = {"none": "the base in full", "nf4": "the base in 4 bit (nf4)", FP8_BY_ROWS: "the base in 8 bit (fp8 by rows)"}
SAME_BASE = {"none": "none", "nf4": "bitsandbytes"}


@dataclass(frozen=True)
class Evaluation:
    """A version's scores, and how much better it is than the other one; in `differences` over 0 is better."""

    version: Version
    other: str
    measured: dict[str, Measured]
    differences: dict[str, Interval]
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    began_s: float = 0.0
    duration_s: float = 0.0

    @property
    def own(self) -> Measured:
        """What was measured of the version itself."""
        return self.measured[self.version.name]


def evaluate(config: ChatbotConfig, registry: Registry, version: Version, against: Version | None, say: Say) -> Evaluation:
    """Ask a version, another one and the base on the engine that serves; return scores with intervals.

    Args:
        config: The chatbot; the version's held-out conversations come from its own data.
        registry: Where the versions lie.
        version: The version to measure.
        against: The version to compare it with, on the same questions; the base if None.
        say: Told of each stage, in words.

    Raises:
        TandemError: The endpoint does not answer, serves another base, or a file that is named cannot be used.
    """
    began_s = time.time()
    require_lm_eval(config.evaluation.lm_eval_tasks)
    served = require_served(config)
    endpoint = served.endpoint
    base = Contender(served_base_name(config.model.name))
    own, other = contender_of(registry, version), contender_of(registry, against) if against else base
    heldout, notes = heldout_of(config, version)
    notes += _serving_notes(version, served.quantization)
    if against and against.tags.get("data_fingerprint") != version.tags.get("data_fingerprint"):
        notes.append(f"{against.name} was trained on other data, and may have seen some of the questions")
    general = _general(config.evaluation.general)
    desk = Desk(config, endpoint, load_tokenizer(ensure_model(config.model)), say)
    measured = {contender.name: desk.ask(contender, heldout, general) for contender in (own, other)}
    if base.name not in measured and general:
        measured[base.name] = desk.ask(base, [], general)
    for name in measured:
        if name != base.name and general:
            measured[name] = with_forgotten(measured[name], measured[base.name])
    verdicts = desk.judge(measured[own.name], measured[other.name])
    if verdicts:
        measured[own.name] = with_sample(measured[own.name], sample_of(verdicts))
        if num_unclear := sum(verdict.unclear for verdict in verdicts):
            notes.append(f"the judge gave no clear verdict on {num_unclear} of {len(verdicts)} questions, which are left out")
    for name in (own.name, other.name):
        tasks = run_tasks(config.evaluation.lm_eval_tasks, endpoint, name, ensure_model(config.model), say)
        measured[name] = replace(measured[name], scores={**measured[name].scores, **tasks})
    differences = compare_all(measured[own.name].samples, measured[other.name].samples)
    differences |= _task_differences(measured[own.name].scores, measured[other.name].scores)
    return Evaluation(version, other.name, measured, differences, verdicts, notes, began_s, time.time() - began_s)


@dataclass(frozen=True)
class ServedBase:
    """Where a chatbot's base model answers, and in which format: it may be another than the config's."""

    endpoint: Endpoint
    quantization: str


def require_served(config: ChatbotConfig) -> ServedBase:
    """Ask our own endpoint what it serves.

    Raises:
        RunError: It does not answer, refuses our key, or serves another base model.
    """
    endpoint = own_endpoint(config.serve, config.evaluation.num_at_once)
    models, base = served_models(endpoint), served_base_name(config.model.name)
    if base not in models:
        why = f"it serves {', '.join(list(models)[:5]) or 'nothing that this key opens'}"
        raise RunError(f"{endpoint.address} does not serve {base}", why, "python -m serve CONFIG, with this chatbot's config")
    return ServedBase(endpoint, str(models[base].get("quantization", config.serve.quantization)))


def require_measurable(config: ChatbotConfig) -> None:
    """Find out before a training what its evaluation would fail at, and whether it has the questions that the gate's rules are about.

    Which metrics need which settings is the schema's to say; here are those that need what lies in files.

    Raises:
        DataError: A file cannot be used, or no held-out conversation that is asked has the key strings that accuracy is about.
        RunError: lm-eval is not installed.
    """
    require_lm_eval(config.evaluation.lm_eval_tasks)
    if config.evaluation.judge.address:
        read_rubric(config.evaluation.judge.rubric)
    _general(config.evaluation.general)
    if ACCURACY not in config.gate.metrics:
        return
    check_source(config.data)
    check_model(config.model)
    asked = spread(read_prepared(prepare(config, ensure_model(config.model)).heldout_file), config.evaluation.num_questions)
    if not any(conversation.keys for conversation in asked):
        why = f"it is about answers with the `keys` of their row, and none of the {len(asked)} held-out rows that are asked has any"
        remedy = "give held-out rows `keys`, or leave the rule out: 'gate.metrics={exact: {minimum: 0.5}}'"
        raise DataError("the gate's rule on accuracy cannot be checked", why, remedy)


def _task_differences(own: dict[str, Interval], other: dict[str, Interval]) -> dict[str, Interval]:
    """Return the differences in lm-eval's tasks, whose single answers we do not have: the two intervals are taken for independent."""
    found = {}
    for name in own.keys() & other.keys():
        if name.startswith("lm_eval."):
            one, two = own[name], other[name]
            spread_low = ((one.value - one.low) ** 2 + (two.high - two.value) ** 2) ** 0.5
            spread_high = ((one.high - one.value) ** 2 + (two.value - two.low) ** 2) ** 0.5
            value = one.value - two.value
            found[name] = Interval(value, value - spread_low, value + spread_high, one.num_questions)
    return found


def contender_of(registry: Registry, version: Version) -> Contender:
    """Return a version with the system message that it was trained with."""
    manifest = json.loads((registry.download(version) / MANIFEST_FILE).read_text())
    return Contender(version.name, manifest.get("system_prompt") or None)


def heldout_of(config: ChatbotConfig, version: Version) -> tuple[list[Conversation], list[str]]:
    """Return the conversations that were held out of the version's training, and what is to be said of them."""
    fingerprint = version.tags.get("data_fingerprint", "")
    file = home_folder() / "data" / f"{version.chatbot}-{fingerprint}" / "heldout.jsonl"
    notes = []
    if not file.is_file():
        data = prepare(config, ensure_model(config.model))
        file = data.heldout_file
        if data.fingerprint != fingerprint:
            notes.append(f"measured on data {data.fingerprint}, trained on {fingerprint}: it may have seen some of the questions")
    found = read_prepared(file)
    asked: list[Conversation] = spread(found, config.evaluation.num_questions)
    if len(asked) < len(found):
        notes.append(f"{len(asked)} of {len(found)} held-out conversations were asked (evaluation.num_questions)")
    return asked, notes


def trained_on(version: Version) -> str:
    """Return the format of the base that an adapter was trained on: `none`, `nf4` or FP8_BY_ROWS."""
    return FP8_BY_ROWS if version.tags.get("precision") == "fp8" else version.tags.get("quantization", "none")


def _serving_notes(version: Version, served: str) -> list[str]:
    """Say where an adapter is served on its base in another precision than it was trained on, or is not measured whole."""
    notes = []
    trained = trained_on(version)
    if SAME_BASE.get(trained, trained) != served:
        what = f"trained on {TRAINED_ON.get(trained, trained)}, served on {SERVED_AS[served]}"
        notes.append(f"{what}: python -m train parity {version.name} measures it")
    if "lm_head" in json.loads(version.tags.get("target_modules", "[]")):
        notes.append("the engine leaves its share of the output layer (lm_head) out of perplexity")
    return notes


def _general(name: str | None) -> list[Conversation]:
    if not name:
        return []
    file: Path = find_file(name)
    source = DataConfig(source=str(file))
    read = read_conversations(source)
    if read.bad:
        raise bad_rows_error(source, read.bad)
    if without := [conversation.origin for conversation in read.conversations if not conversation.keys]:
        why = f"without keys there is no right answer: {', '.join(without[:5])}"
        raise DataError(f"{name} has questions without keys", why, "give each row its `keys`, or evaluation.general=null")
    return read.conversations
