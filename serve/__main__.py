"""`python -m serve CONFIG|promote|rollback|status`: serve a base model with its adapters, and say which version is live."""

import json
from typing import Annotated

import typer
from rich.table import Table

from cluster.registry import Registry
from cluster.session import require_session
from configs.cli import Overrides, console, make_app, run_app
from configs.loader import load_chatbot

app = make_app("Serve a base model with its adapters, and choose which version is live.", default="run")
VersionName = Annotated[str, typer.Argument(metavar="NAME:VERSION", help="Such as helpdesk:3.")]


@app.command()
def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The chatbot's YAML file.")],
    overrides: Overrides = None,
) -> None:
    """Start the engine on a serve card, and return when it answers; the same config again changes nothing."""
    from serve.deploy import deploy

    settings = load_chatbot(config, overrides or [])
    session = require_session()
    with console.status("starting the engine") as spinner:
        address = deploy(settings, session, lambda words: spinner.update(words))
    console.print(f"[green]serving[/]  {settings.model.name} and its adapters at [bold]{address}[/]")


@app.command()
def demo(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The chatbot's YAML file.")] = "configs/helpdesk.yaml",
    overrides: Overrides = None,
) -> None:
    """Run the whole job once, from nothing to a live chatbot, and tell it as a story."""
    from serve.demo import tell

    tell(load_chatbot(config, overrides or []), config, overrides or [])


@app.command()
def promote(version: VersionName) -> None:
    """Make a version live: requests for the chatbot's name go to it within two seconds, and no engine restarts."""
    promoted = Registry(require_session().mlflow_url).promote(version)
    console.print(f"[green]live[/]  {promoted.name}")


@app.command()
def rollback(chatbot: Annotated[str, typer.Argument(metavar="NAME", help="Such as helpdesk.")]) -> None:
    """Make the version live that was live before; a second rollback undoes the first."""
    version = Registry(require_session().mlflow_url).rollback(chatbot)
    console.print(f"[green]live[/]  {version.name} again")


@app.command()
def status() -> None:
    """List versions with their aliases, and whether the engine answers."""
    from serve.deploy import application_status

    session = require_session()
    state, reason = application_status(session)
    console.print(f"engine  {state}{f': {reason}' if reason and state != 'RUNNING' else ''}", markup=False)
    table = Table("version", "aliases", "base", "rank", "data", "held-out loss", box=None, pad_edge=False)
    for version in Registry(session.mlflow_url).versions():
        loss = json.loads(version.tags.get("scores", "{}")).get("eval_loss")
        table.add_row(
            version.name,
            ", ".join(version.aliases),
            version.tags.get("base_model", ""),
            version.tags.get("rank", ""),
            version.tags.get("data_fingerprint", ""),
            "" if loss is None else f"{loss:.3f}",
        )
    console.print(table)


if __name__ == "__main__":
    run_app(app, "serve")
