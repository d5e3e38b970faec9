"""`python -m train CONFIG [key=value ...]`: train one adapter, in a Ray job or straight."""

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from configs.cli import Overrides, console, make_app, run_app
from configs.errors import EXIT_STOPPED, RunError
from configs.loader import load_chatbot

if TYPE_CHECKING:
    from train.control import Progress

app = make_app("Train a chatbot's adapter.", default="run")
LINE_EVERY_S = 5.0


@app.command()
def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The chatbot's YAML file.")],
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with this stopped or failed run.")] = None,
) -> None:
    """Train one adapter on a train card, and register it."""
    if resume and overrides:
        why = "a run goes on with the config that it was begun with"
        raise RunError("--resume takes no settings", why, f"leave out {' '.join(overrides)}, or --resume to train anew")
    settings = load_chatbot(config, overrides or [])
    from train.job import train

    outcome = train(settings, lambda words: console.print(f"[dim]train[/]  {words}"), ProgressLines(), resume)
    if outcome.stop_reason:
        where = f"at step {int(outcome.metrics['step'])}" if outcome.metrics else "at once"
        console.print(f"stopped {where}: {outcome.stop_reason}. Go on with: python -m train {config} --resume {outcome.run_id}")
        sys.exit(EXIT_STOPPED)
    assert outcome.version
    console.print(
        f"[green]done[/]   registered as [bold]{outcome.version.name}[/]; to make it live: python -m serve promote {outcome.version.name}"
    )


class ProgressLines:
    """Prints a line of progress every few seconds, and at the last step."""

    def __init__(self) -> None:
        self.printed_s = 0.0

    def __call__(self, progress: "Progress") -> None:
        """Show one state of the run."""
        now_s = time.monotonic()
        if now_s - self.printed_s < LINE_EVERY_S and progress.step < progress.num_steps:
            return
        self.printed_s = now_s
        parts = [f"step {progress.step}/{progress.num_steps}"]
        if progress.loss is not None:
            parts.append(f"loss {progress.loss:.3f}")
        if progress.eval_loss is not None:
            parts.append(f"held-out loss {progress.eval_loss:.3f}")
        if progress.tokens_per_s:
            parts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
        console.print(f"[dim]train[/]  {' · '.join(parts)}")


if __name__ == "__main__":
    run_app(app, "train")
