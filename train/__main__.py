"""`python -m train CONFIG [key=value ...]`: train one adapter, in a Ray job or straight; evaluate a version, and let it in if it passes."""

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cluster.job_queue import note_progress
from cluster.registry import Registry, Version
from cluster.session import require_session
from configs.cli import Overrides, console, make_app, run_app
from configs.errors import EXIT_NOT_PROMOTED, EXIT_STOPPED, RegistryError, RunError
from configs.loader import load_chatbot, with_overrides
from configs.schema import ChatbotConfig

if TYPE_CHECKING:
    from train.control import Progress
    from train.evaluate import Evaluation

app = make_app("Train a chatbot's adapter, measure it, and let it in if it passes the gate.", default="run")
LINE_EVERY_S = 5.0
LIVE, BASE = "live", "base"
VersionName = Annotated[str, typer.Argument(metavar="NAME:VERSION", help="Such as helpdesk:3; helpdesk is the live one.")]
ConfigFile = Annotated[str | None, typer.Option("--config", metavar="CONFIG", help="Another config than the one it was trained with.")]


@app.command()
def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The chatbot's YAML file.")],
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with this stopped or failed run.")] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Then evaluate it, and let it in if it passes the gate.")] = False,
) -> None:
    """Train one adapter on a train card, and register it; with --promote, exit status 3 says that the gate kept it out."""
    if resume and overrides:
        why = "a run goes on with the config that it was begun with"
        raise RunError("--resume takes no settings", why, f"leave out {' '.join(overrides)}, or --resume to train anew")
    settings = load_chatbot(config, overrides or [])
    from train.driver import had_ended, wait_readily

    standby = wait_readily(settings)
    if resume and had_ended(resume):
        console.print(f"[green]done[/]   run {resume} had ended before")
        return
    from train.job import train

    if promote:
        from train.evaluate import require_measurable, require_served

        require_served(settings)  # before the training, and not after hours of it
        require_measurable(settings)
    outcome = train(settings, _say, ProgressLines(), resume, standby)
    if outcome.stop_reason:
        where = f"at step {int(outcome.metrics['step'])}" if outcome.metrics else "at once"
        console.print(f"stopped {where}: {outcome.stop_reason}. Go on with: python -m train {config} --resume {outcome.run_id}")
        sys.exit(EXIT_STOPPED)
    assert outcome.version
    name = outcome.version.name
    if not promote:
        console.print(f"[green]done[/]   registered as [bold]{name}[/]; to make it live: python -m serve promote {name}")
        return
    console.print(f"[green]done[/]   registered as [bold]{name}[/]; now the gate")
    _release(settings, outcome.version, just_trained=True)


@app.command()
def evaluate(
    version: VersionName,
    overrides: Overrides = None,
    against: Annotated[str, typer.Option(metavar="WHOM", help="`live`, `base`, or a version such as helpdesk:2.")] = BASE,
    config: ConfigFile = None,
    promote: Annotated[bool, typer.Option("--promote", help="Let it in if it passes the gate; compares with the live version.")] = False,
) -> None:
    """Measure a version on the engine that serves it: perplexity, answers, what it forgot; with --promote, exit status 3 is a no."""
    registry = Registry(require_session().mlflow_url)
    found = registry.find(version)
    settings = _config_of(registry, found, config, overrides or [])
    if promote:
        _release(settings, found)
        return
    from train.release import measure

    _show(measure(settings, registry, found, _opponent(registry, found, against), _say))


@app.command()
def parity(version: VersionName, overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Compare the served adapter's log-probabilities with those of transformers and PEFT; exit status 1 says that they differ too much."""
    registry = Registry(require_session().mlflow_url)
    found = registry.find(version)
    settings = _config_of(registry, found, config, overrides or [])
    from train.parity import compare_engines

    result = compare_engines(settings, registry, found)
    console.print(f"{'[green]same[/]' if result.agrees else '[red]differs[/]'}  {result}", soft_wrap=True)
    raise typer.Exit(not result.agrees)


def _config_of(registry: Registry, version: Version, file: str | None, overrides: list[str]) -> ChatbotConfig:
    """Return the config that a version was trained with, or another file's; the gate and the endpoint may have changed since."""
    if file:
        return load_chatbot(file, overrides)
    from train.record import read_config

    return with_overrides(read_config(registry.client, version.run_id), overrides, f"the config of {version.name}")


def _opponent(registry: Registry, version: Version, against: str) -> Version | None:
    if against == BASE:
        return None
    found = registry.find(version.chatbot if against == LIVE else against)
    if found.name == version.name:
        raise RegistryError(f"{version.name} cannot be compared with itself", f"--against {against} means it too", "--against base")
    if found.tags.get("base_fingerprint") != version.tags.get("base_fingerprint"):
        why = "they were made for different base models, and one engine serves one base"
        raise RegistryError(f"{version.name} cannot be compared with {found.name}", why, "--against base")
    return found


def _release(settings: ChatbotConfig, version: Version, just_trained: bool = False) -> None:
    from train.release import release

    registry = Registry(require_session().mlflow_url)
    outcome = release(settings, registry, version, _say)
    _show(outcome.evaluation)
    if not outcome.is_in:
        why = "the gate" if not outcome.decision.passed else "the watch"
        console.print(f"[red]not let in[/]  {version.name}, by {why}; {settings.name} goes on as before")
        sys.exit(EXIT_NOT_PROMOTED)
    if outcome.first_token_s is None:
        share = f"{100 * settings.gate.canary_share:g}%"
        console.print(
            f"[green]canary[/]  {version.name} answers {share} of the conversations; for all: python -m serve promote {version.name}"
        )
        return
    console.print(f"[green]live[/]   {version.name}")
    if just_trained and outcome.finished_to_live_s is not None:
        registry.client.log_metric(version.run_id, "finished_to_live_s", outcome.finished_to_live_s)
        console.print(f"       last training step to its first token by name: {outcome.finished_to_live_s:.1f} s besides the evaluation")


def _show(found: "Evaluation") -> None:
    """Print the scores as a table."""
    from train.report_page import score_rows

    table = Table("metric", *found.measured, f"better than {found.other} by", box=None, pad_edge=False)
    for row in score_rows(found):
        table.add_row(row["metric"], *row["cells"], row["difference"])
    console.print(table)
    for note in found.notes:
        console.print(f"[yellow]note[/]  {note}", soft_wrap=True)


def _say(words: str) -> None:
    console.print(f"[dim]train[/]  {words}")


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
        note_progress(progress.step, progress.num_steps)
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
