"""`python -m data prepare|inspect|synthesize`: conversations in, training rows out."""

from pathlib import Path
from typing import Annotated

import typer

from configs.cli import Overrides, console, make_app, run_app
from configs.loader import load_chatbot
from data.prepare import Prepared, check_source, prepare
from data.show import prepared_table, show_rows
from data.synthesize import Options, synthesize

app = make_app("Check conversations, look at them as the model sees them, and make more.")


@app.command("prepare")
def prepare_command(config: str, overrides: Overrides = None) -> None:
    """Read, check, split and tokenise a chatbot's conversations."""
    prepared, _ = _prepare(config, overrides)
    console.print(prepared_table(prepared))


@app.command()
def inspect(config: str, overrides: Overrides = None, rows: Annotated[int, typer.Option(min=0, help="Conversations shown.")] = 3) -> None:
    """Show counts, lengths, and which tokens the model learns to say."""
    prepared, model_folder = _prepare(config, overrides)
    console.print(prepared_table(prepared))
    show_rows(prepared, model_folder, load_chatbot(config, overrides or []).data, rows)


@app.command("synthesize")
def synthesize_command(
    config: str,
    out: Annotated[Path, typer.Option(help="File to write, in chat JSONL.")],
    overrides: Overrides = None,
    per_fact: Annotated[int, typer.Option(min=1, help="New conversations for each fact.")] = 8,
    endpoint: Annotated[str, typer.Option(help="Any OpenAI-compatible endpoint.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str, typer.Option(help="Model that rewords; the config's base model or chatbot if empty.")] = "",
    templates: Annotated[bool, typer.Option("--templates", help="Reword by fixed English templates; needs no model.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
) -> None:
    """Ask the training questions in more ways, and write the whole as a new file."""
    options = Options(out, per_fact, endpoint, model, templates, force)
    synthesize(load_chatbot(config, overrides or []), options)


def _prepare(file: str, overrides: list[str] | None) -> tuple[Prepared, Path]:
    from cluster.models import ensure_model

    config = load_chatbot(file, overrides or [])
    check_source(config.data)
    model_folder = ensure_model(config.model)
    return prepare(config, model_folder), model_folder


if __name__ == "__main__":
    run_app(app, "data")
