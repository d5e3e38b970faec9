"""`python -m tune CONFIG [key=value ...]`: search for better settings, in a Ray job or straight."""

import sys
from typing import Annotated

import typer
from rich.markup import escape

from configs.cli import Overrides, console, make_app, run_app
from configs.errors import EXIT_STOPPED, RunError
from configs.loader import load_chatbot
from configs.space import load_sweep

app = make_app("Search for better settings of a chatbot's training.", default="run")


@app.command()
def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The chatbot's YAML file, with a group `tune`.")],
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(metavar="SWEEP", help="Go on with this stopped or failed sweep.")] = None,
) -> None:
    """Try settings on the train cards, and register the best trial as the chatbot's candidate."""
    if resume and overrides:
        why = "a sweep goes on with the config that it was begun with"
        raise RunError("--resume takes no settings", why, f"leave out {' '.join(overrides)}, or --resume to begin anew")
    settings = load_chatbot(config) if resume else load_sweep(config, overrides or [])
    from train.driver import had_ended

    if resume and had_ended(resume):
        console.print(f"[green]done[/]   sweep {resume} had ended before")
        return
    from tune.outcome import table
    from tune.progress import Lines
    from tune.sweep import sweep

    outcome = sweep(settings, lambda words: console.print(f"[dim]tune[/]   {escape(words)}"), Lines, resume)
    if outcome.stop_reason:
        console.print(f"stopped: {outcome.stop_reason}. Go on with: python -m tune {config} --resume {outcome.sweep_id}")
        sys.exit(EXIT_STOPPED)
    assert outcome.best
    assert outcome.version
    assert outcome.figures
    console.print(table(outcome.rows, outcome.sweep))
    spent, full = outcome.figures["num_tokens"], outcome.figures["num_tokens_full_grid"]
    console.print(f"[dim]tune[/]   {spent:,.0f} tokens, {spent / full:.0%} of what all trials to their end would take ({full:,.0f})")
    console.print(f"[dim]tune[/]   plots in {outcome.folder}, and with run {outcome.sweep_id} in MLflow")
    name, number = outcome.version.name, outcome.best.number
    console.print(f"[green]done[/]   trial {number} is [bold]{name}[/], the candidate; to make it live: python -m serve promote {name}")


if __name__ == "__main__":
    run_app(app, "tune")
