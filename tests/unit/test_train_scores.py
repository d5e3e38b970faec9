"""Scores and their intervals, and the gate that holds them against its rules: from numbers alone."""

import math

import pytest

from configs.errors import ConfigError, RunError
from configs.loader import load_chatbot
from configs.schema import GateConfig, GateRule, WatchConfig
from data.ask import Probe
from train.gate import NOTHING_LIVE, OTHER_BASE, decide
from train.lm_tasks import main_score
from train.scores import Interval, Sample, compare, compare_all, measure, shown_interval
from train.watch import Health, worse


def shares(*values: float, metric: str = "accuracy") -> Sample:
    return Sample.of_shares(metric, values)


def test_a_share_has_an_interval_that_narrows_with_more_questions():
    few, many = measure(shares(*[1, 1, 1, 0] * 5)), measure(shares(*[1, 1, 1, 0] * 100))
    assert few.value == many.value == 0.75
    assert few.low < many.low < 0.75 < many.high < few.high
    # The normal approximation of a share of 0.75 over 400 questions.
    assert many.low == pytest.approx(0.75 - 1.96 * math.sqrt(0.75 * 0.25 / 400), abs=0.01)
    assert measure(shares(*[1, 1, 1, 0] * 5)) == few, "the same answers have the same interval"


def test_wordings_of_one_question_are_drawn_as_one():
    right = [1, 1, 1, 0] * 15
    alone, grouped = (
        measure(shares(*right)),
        measure(Sample.of_shares("accuracy", [r for r in right for _ in "ab"], [str(n) for n in range(60) for _ in "ab"])),
    )
    assert (grouped.value, grouped.low, grouped.high) == (alone.value, alone.low, alone.high), "the second wording brings no news here"
    assert grouped.num_questions == 120
    loose = measure(Sample.of_shares("accuracy", [1, 0], [None, None]))
    assert loose.low == 0.0
    assert loose.high == 1.0


def test_perplexity_weighs_each_token_alike():
    sample = Sample("perplexity", (math.log(2) * 3, math.log(8)), (3.0, 1.0))
    assert measure(sample).value == pytest.approx(math.exp((3 * math.log(2) + math.log(8)) / 4))


def test_a_difference_is_drawn_in_pairs_and_over_zero_is_better():
    old = shares(*[1, 0] * 50)
    assert compare(old, old) == Interval(0, 0, 0, 100), "unpaired draws would differ"
    better = compare(shares(*[1, 1] * 25, *[1, 0] * 25), old)
    assert better.value == 0.25
    assert better.low > 0
    surprises = [Sample("perplexity", (nats,) * 9, (1.0,) * 9) for nats in (1.0, 2.0)]
    assert compare(surprises[0], surprises[1]).value == pytest.approx(math.exp(2) - math.e), "a lower perplexity is better"


def test_versions_that_were_asked_other_questions_are_not_compared():
    with pytest.raises(RunError, match="3 questions against 2"):
        compare(shares(1, 1, 1), shares(1, 1))
    assert compare_all({"accuracy": shares()}, {"accuracy": shares()}) == {}, "nothing was asked"


def test_one_question_has_no_interval():
    assert measure(shares(1)) == Interval(1, 1, 1, 1)
    assert shown_interval("accuracy", Interval(0.5, 0.25, 0.75, 4)) == "50.0% (25.0% to 75.0%)"
    assert shown_interval("perplexity", Interval(0.5, -0.25, 0.75, 4), sign=True) == "+0.500 (-0.250 to +0.750)"


SCORES = {"accuracy": Interval(0.8, 0.7, 0.9, 100), "perplexity": Interval(2.0, 1.8, 2.2, 100)}


@pytest.mark.parametrize(
    ("metric", "rule", "certain", "passes"),
    [
        ("accuracy", {"minimum": 0.8}, False, True),
        ("accuracy", {"minimum": 0.81}, False, False),
        ("accuracy", {"minimum": 0.75}, True, False),
        ("perplexity", {"maximum": 2.1}, False, True),
        ("perplexity", {"maximum": 2.1}, True, False),
        ("perplexity", {"maximum": 1.9}, False, False),
        ("accuracy", {"must_beat_live_by": 0.05}, False, True),
        ("accuracy", {"must_beat_live_by": 0.05}, True, False),
        ("accuracy", {"must_beat_live_by": 0.06}, False, False),
        ("perplexity", {"may_lose_at_most": 0.1}, False, True),
        ("perplexity", {"may_lose_at_most": 0.1}, True, False),
        ("perplexity", {"may_lose_at_most": 0.05}, False, False),
        ("perplexity", {"must_beat_live_by": 0.0}, False, False),
        ("accuracy", {"minimum": 0.1, "maximum": 0.2}, False, False),
        ("exact", {"minimum": 0.0}, False, False),
    ],
)
def test_the_gate_holds_each_rule_against_value_or_interval(metric, rule, certain, passes):
    differences = {"accuracy": Interval(0.05, 0.01, 0.09, 100), "perplexity": Interval(-0.1, -0.3, 0.1, 100)}
    decision = decide(GateConfig(metrics={metric: GateRule(**rule)}, certain=certain), SCORES, differences)
    assert decision.passed is passes
    assert decision.to_dict()["checks"][0]["metric"] == metric


def test_what_is_relative_to_the_live_version_holds_where_nothing_is_live():
    rules = {"accuracy": GateRule(minimum=0.9, must_beat_live_by=0.5)}
    decision = decide(GateConfig(metrics=rules), SCORES, NOTHING_LIVE)
    assert [check.passed for check in decision.checks] == [False, True]
    assert str(decision.checks[0]) == "accuracy minimum=0.9: 80.0%"
    assert str(decision.checks[1]) == "accuracy must_beat_live_by=0.5: nothing to compare with is live"


def test_a_version_for_another_base_than_the_live_one_beats_nothing():
    rules = {"accuracy": GateRule(minimum=0.5, may_lose_at_most=0.1, must_beat_live_by=0.0)}
    decision = decide(GateConfig(metrics=rules), SCORES, OTHER_BASE)
    assert {check.rule: check.passed for check in decision.checks} == {
        "minimum": True,
        "must_beat_live_by": False,
        "may_lose_at_most": True,
    }


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("gate.metrics.acuracy.minimum=0.5", "gate.metrics.acuracy: no such metric"),
        ("gate.metrics.judge.minimum=0.5", "there is no judge"),
        ("gate.metrics.accuracy.least=0.5", "no such setting"),
        ("gate.watch.minutes=0.5", "in 0.5 minutes it sees 12 answers at most, and judges from min_answers=20 on"),
        ("evaluation.judge.address=http://127.0.0.1/v1", "needs evaluation.judge.model"),
    ],
)
def test_a_gate_on_what_is_not_measured_is_refused(override, says, tmp_path):
    (tmp_path / "bot.yaml").write_text("name: bot\ndata: {source: rows.jsonl}\n")
    with pytest.raises(ConfigError, match=says):
        load_chatbot(tmp_path / "bot.yaml", [override])


def health(num_failed: int = 0, duration_s: float = 0.1, num_down: int = 0) -> Health:
    probes = tuple(Probe(duration_s, failed=number < num_failed) for number in range(20))
    return Health(probes, ("down",) * num_down + ("up",) * (10 - num_down))


@pytest.mark.parametrize(
    ("new", "says"),
    [
        (health(), None),
        (health(num_failed=1), None),
        (health(num_failed=2), "10% of its requests fail"),
        (health(duration_s=0.19), None),
        (health(duration_s=0.21), "its median answer takes 0.21 s"),
        (health(num_down=2), None),
        (health(num_down=3), "30% of its thumbs point down"),
        (Health(health(num_failed=20).probes[:19], ("down",) * 9), None),  # not enough to know
    ],
)
def test_a_watch_says_in_which_way_a_version_is_worse(new, says):
    reasons = worse(WatchConfig(), new, health())
    assert (not reasons) if says is None else reasons[0].startswith(says)


def test_a_tasks_interval_comes_from_its_standard_error(tmp_path):
    found = main_score(tmp_path / "facts.yaml", {"alias": "facts", "acc,none": 0.5, "acc_stderr,none": 0.1}, 25)
    assert found == Interval(0.5, pytest.approx(0.304), pytest.approx(0.696), 25)
