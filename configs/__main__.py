"""`python -m configs check|machine|schema|show`: look at settings without starting anything."""

import json
from typing import Annotated

import typer
from rich.markup import escape

from configs.cli import ConfigFile, Overrides, console, make_app, run_app
from configs.loader import load_chatbot, load_machine
from configs.schema import ChatbotConfig, MachineConfig

app = make_app("Check configs, and list every setting.")


@app.command()
def check(file: ConfigFile, overrides: Overrides = None) -> None:
    """Check one chatbot's config, and report every mistake at once."""
    config = load_chatbot(file, overrides or [])
    console.print(f"[green]ok[/]  {escape(file)} is the chatbot [bold]{config.name}[/] on {escape(config.model.name)}")


@app.command()
def machine(
    name: Annotated[str, typer.Argument(metavar="MACHINE", help="File, or a name in configs/machines.")] = "auto",
    overrides: Overrides = None,
) -> None:
    """Check one machine's config: a file, or a name in configs/machines."""
    config = load_machine(name, overrides or [])
    cards = config.cards if isinstance(config.cards, str) else f"{len(config.cards)} cards"
    console.print(f"[green]ok[/]  {escape(name)}: {cards}")


@app.command()
def schema(machines: Annotated[bool, typer.Option("--machine", help="Of a machine, instead of a chatbot.")] = False) -> None:
    """Print the JSON schema of a chatbot's config."""
    print(json.dumps((MachineConfig if machines else ChatbotConfig).model_json_schema(), indent=2))


@app.command()
def show(file: ConfigFile, overrides: Overrides = None) -> None:
    """Print one chatbot's config with every default filled in."""
    print(load_chatbot(file, overrides or []).model_dump_json(indent=2))


if __name__ == "__main__":
    run_app(app, "configs")
