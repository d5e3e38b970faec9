"""An evaluation as a page: scores with their intervals, and the answers side by side; without any outside address.

Knows how it looks. Does not know how anything was measured.
"""

import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from data.ask import Answer
from train.contenders import spread
from train.evaluate import Evaluation
from train.judge import Verdict
from train.scores import shown_interval

NONE = "–"
ABOUT = {
    "perplexity": "how surprised it is by the held-out answers; 1 is not at all, lower is better",
    "accuracy": "held-out answers with all key strings",
    "exact": "held-out answers word for word",
    "general": "general questions answered right",
    "forgotten": "general questions that the base answers right and this version does not; lower is better",
    "judge": "points of the judge: 1 a win, 0.5 a tie",
}


def page(found: Evaluation) -> str:
    """Return the page as HTML; whatever anybody wrote is escaped."""
    names = list(found.measured)
    heldout = [name for name in names if found.measured[name].answers]
    groups = [
        _group("Held-out questions", heldout, [found.measured[name].answers for name in heldout], _judged(found)),
        _group("General questions", names, [found.measured[name].general for name in names], {}),
    ]
    return str(
        _template().render(
            version=found.version,
            other=found.other,
            notes=found.notes,
            began=time.strftime("%Y-%m-%d %H:%M", time.localtime(found.began_s)),
            duration_s=found.duration_s,
            names=names,
            scores=score_rows(found),
            groups=[group for group in groups if group["rows"]],
        )
    )


def score_rows(found: Evaluation) -> list[dict[str, Any]]:
    """Return a row for each metric: each contender's value with its interval, and the difference."""
    metrics = list(dict.fromkeys(metric for measured in found.measured.values() for metric in measured.scores))
    rows = []
    for metric in metrics:
        scores = [measured.scores.get(metric) for measured in found.measured.values()]
        difference = found.differences.get(metric)
        rows.append(
            {
                "metric": metric,
                "about": ABOUT.get(metric, ""),
                "cells": [shown_interval(metric, score) if score else NONE for score in scores],
                "difference": shown_interval(metric, difference, sign=True) if difference else NONE,
                "num_questions": max(score.num_questions for score in scores if score),
            }
        )
    return rows


def _group(title: str, names: list[str], said: Sequence[Sequence[Answer]], judged: dict[int, Verdict]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for answers in zip(*said, strict=True):
        turns = [turn for turn in answers[0].conversation.messages if turn.role != "system"]
        verdict = judged.get(len(rows))
        rows.append(
            {
                "question": "\n\n".join(turn.content for turn in turns[:-1]),
                "wanted": turns[-1].content,
                "answers": [{"text": answer.text, "mark": _mark(answer)} for answer in answers],
                "judged": f"{verdict.points:g}" if verdict and not verdict.unclear else "",
            }
        )
    return {"title": title, "names": names, "rows": rows, "judged": bool(judged)}


def _mark(answer: Answer) -> str:
    if not answer.conversation.keys:
        return ""
    return "right" if answer.right else "wrong"


def _judged(found: Evaluation) -> dict[int, Verdict]:
    """Return each verdict with the place of its question."""
    places = spread(range(len(found.own.answers)), len(found.verdicts)) if found.verdicts else []
    return dict(zip(places, found.verdicts, strict=True))


@lru_cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader

    return Environment(autoescape=True, loader=FileSystemLoader(Path(__file__).parent)).get_template("report.html")
