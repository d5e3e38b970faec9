"""lm-eval's tasks, asked through our own endpoint, where their data is local and lm-eval is installed.

Knows lm-eval's API. Does not know what a task is about.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from configs.errors import DataError, RunError
from configs.loader import find_file
from data.ask import Endpoint
from train.contenders import Say
from train.scores import Interval

PREFERRED = ("acc,none", "exact_match,none", "exact_match,strict-match", "acc_norm,none", "f1,none")
NORMAL_95 = 1.96


def require_lm_eval(files: list[str]) -> None:
    """Refuse tasks that cannot be run, before anything is trained for them.

    Raises:
        RunError: lm-eval is not installed.
        DataError: A task's file is not there.
    """
    if not files:
        return
    if find_spec("lm_eval") is None:
        why = "evaluation.lm_eval_tasks names tasks, and lm-eval is no part of Tandem's packages"
        raise RunError("lm-eval is not installed", why, "uv pip install 'lm-eval[api]', or evaluation.lm_eval_tasks=[]")
    for name in files:
        if not find_file(name).is_file():
            raise DataError(f"no task file {name}", "evaluation.lm_eval_tasks names it", "name a task's YAML file, with local data")


def run_tasks(files: list[str], endpoint: Endpoint, model: str, tokenizer: Path, say: Say) -> dict[str, Interval]:
    """Return the main metric of each task as `lm_eval.NAME`; its interval is lm-eval's standard error, taken for a normal one's.

    Raises:
        DataError: A task's file cannot be used.
        RunError: lm-eval is not installed.
    """
    require_lm_eval(files)
    found = {}
    for name in files:
        file = find_file(name)
        say(f"asking {model}: the lm-eval task {file.stem}")
        found[f"lm_eval.{file.stem}"] = _run(file, endpoint, model, tokenizer)
    return found


def _run(file: Path, endpoint: Endpoint, model: str, tokenizer: Path) -> Interval:
    import lm_eval
    from lm_eval.tasks import TaskManager

    arguments = {
        "model": model,
        "base_url": f"{endpoint.address}/completions",
        "tokenizer": str(tokenizer),
        "tokenizer_backend": "huggingface",
        "num_concurrent": endpoint.num_at_once,
        "tokenized_requests": True,
    }
    os.environ["OPENAI_API_KEY"] = endpoint.api_key or "none"  # where lm-eval looks for it
    try:
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model="local-completions",
            model_args=arguments,
            tasks=[str(file)],
            task_manager=TaskManager(include_defaults=False),
            batch_size=1,
            bootstrap_iters=1000,  # none would mean no standard errors either
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the lm-eval task {file} cannot be used", f"{type(error).__name__}: {error}", "try it with lm_eval alone"
        ) from error
    (scores,) = results["results"].values()
    (num_questions,) = [counts["effective"] for counts in results["n-samples"].values()]
    return main_score(file, scores, num_questions)


def main_score(file: Path, scores: dict[str, Any], num_questions: int) -> Interval:
    """Return the first of a task's metrics that says how much was right, with the interval that its standard error gives.

    Raises:
        DataError: It has none.
    """
    for name in PREFERRED:
        if name in scores:
            value, error = float(scores[name]), scores.get(name.replace(",", "_stderr,"))
            reach = NORMAL_95 * float(error) if isinstance(error, float) else 0.0
            return Interval(value, max(0.0, value - reach), min(1.0, value + reach), num_questions)
    raise DataError(
        f"the lm-eval task {file} has no metric that is known here", f"known: {', '.join(PREFERRED)}", "give it acc or exact_match"
    )
