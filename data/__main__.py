"""`python -m data prepare|inspect|synthesize|feedback|accept|trace|forget`: conversations in, training rows out, and back."""

import time
from pathlib import Path
from typing import Annotated

import typer

from cluster.home import OWNER_ONLY, write_text, writing
from configs.cli import ConfigFile, Overrides, console, make_app, parse_duration_s, run_app
from configs.errors import DataError
from configs.loader import load_chatbot
from configs.schema import ChatbotConfig
from data.conversations import to_jsonl
from data.feedback import ACCEPTED, PENDING, Review, review_lock
from data.prepare import Prepared, check_source, copy_prepared, prepare
from data.scrub import Scrubber
from data.show import prepared_table, show_rows
from data.synthesize import Options, synthesize

app = make_app("Check conversations, look at them as the model sees them, make more, and follow where they went.")
Chatbot = Annotated[str, typer.Argument(metavar="NAME|CONFIG", help="Such as helpdesk, for configs/helpdesk.yaml.")]


@app.command("prepare")
def prepare_command(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for a copy, at a place of its own, as DVC wants it.")] = None,
) -> None:
    """Read, check, split and tokenise a chatbot's conversations."""
    prepared, _ = _prepare(config, overrides)
    if out:
        copy_prepared(prepared, out)


@app.command()
def inspect(
    config: ConfigFile, overrides: Overrides = None, rows: Annotated[int, typer.Option(min=0, help="Conversations shown.")] = 3
) -> None:
    """Show counts, lengths, and which tokens the model learns to say."""
    prepared, model_folder = _prepare(config, overrides)
    show_rows(prepared, model_folder, load_chatbot(config, overrides or []).data, rows)


@app.command("synthesize")
def synthesize_command(
    config: ConfigFile,
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


@app.command("feedback")
def feedback_command(
    chatbot: Chatbot,
    overrides: Overrides = None,
    since: Annotated[str, typer.Option(metavar="TIME", help="How far back to look, such as 7d, 12h or 5m.")] = "30d",
    raw: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write all that was said, as it is stored: with personal data.")
    ] = None,
) -> None:
    """Make training rows of what people said of answers, without personal data; they wait for `accept`."""
    from data.feedback_store import Row, all_feedback
    from data.show import show_gathered

    config = _load(chatbot, overrides)
    since_s = time.time() - parse_duration_s(since)

    def own() -> list[Row]:
        return [row for row in all_feedback() if row["version"].partition(":")[0] == config.name]

    if raw:
        text = to_jsonl({name: value for name, value in row.items() if value is not None} for row in own())
        with writing(raw, "name another --raw"):
            write_text(raw, text, OWNER_ONLY)
    review = Review(config.name)
    gathered = review.gather(own, since_s, lambda: Scrubber(config.data.scrub_keep))
    show_gathered(gathered, review.folder)
    if gathered.pending:
        console.print(f"next       python -m data accept {chatbot}", markup=False)


@app.command()
def accept(
    chatbot: Chatbot,
    overrides: Overrides = None,
    everything: Annotated[bool, typer.Option("--all", help="Take every row that waits, without asking for each.")] = False,
) -> None:
    """Look at the rows that `feedback` made, and choose which may be trained on."""
    from data.show import ask_for_each

    config = _load(chatbot, overrides)
    review = Review(config.name)
    waiting = review.read(PENDING)
    if everything:
        review.decide(waiting, [])
    elif waiting:
        ask_for_each(waiting, review.decide)
    left, num_accepted = len(review.read(PENDING)), len(review.read(ACCEPTED))
    console.print(
        f"[green]accepted[/]  {num_accepted} rows in all, {left} still wait; the next training of {config.name} reads the accepted ones"
    )


@app.command()
def trace(
    version: Annotated[str, typer.Argument(metavar="NAME:VERSION", help="Such as helpdesk:5; helpdesk is the live one.")],
    row: Annotated[str | None, typer.Option(metavar="TEXT", help="Show the rows that hold this text, and where they came from.")] = None,
) -> None:
    """List where a version's training data came from."""
    from cluster.registry import Registry
    from cluster.session import require_session
    from data.trace import show_rows_with, show_trace, trace

    found = trace(Registry(require_session().mlflow_url).find(version))
    show_trace(found)
    if row:
        show_rows_with(found, row)


@app.command()
def forget(
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="Name of the person's key.")] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="A name, mail address or number that their rows hold.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without, it is only shown.")] = False,
) -> None:
    """Take out one person's rows wherever Tandem keeps them, and list the versions that were trained on them."""
    from cluster.registry import Registry
    from cluster.session import require_session
    from data.forget import by_key, by_text, find, forget, show_found

    if (key is None) == (text is None):
        raise DataError("whose rows?", "", "python -m data forget KEY, or --text TEXT")
    is_theirs = by_key(key) if key is not None else by_text(text or "")
    session = require_session()
    registry = Registry(session.mlflow_url)
    with review_lock():  # else a row that is accepted meanwhile would stay
        found = find(is_theirs, registry, session.storage)
        show_found(found)
        if yes:
            forget(found, is_theirs, registry, session.storage)
    if yes:
        console.print(f"[green]forgotten[/]  {found.num_rows} rows, {len(found.pages)} pages")
    elif found.num_rows or found.pages or found.copies:
        console.print("nothing is changed yet: --yes does it")


def _load(chatbot: str, overrides: list[str] | None) -> ChatbotConfig:
    """Read the config of a chatbot that is named by itself or by its file."""
    return load_chatbot(chatbot if chatbot.endswith((".yaml", ".yml")) else f"configs/{chatbot}.yaml", overrides or [])


def _prepare(file: str, overrides: list[str] | None) -> tuple[Prepared, Path]:
    """Prepare a config's conversations and report them; return them, and the model's folder."""
    from cluster.models import ensure_model

    config = load_chatbot(file, overrides or [])
    check_source(config.data)
    model_folder = ensure_model(config.model)
    prepared = prepare(config, model_folder)
    console.print(prepared_table(prepared))
    if warning := prepared.too_long(config.data.max_length_tokens):
        console.print(f"[yellow]warning[/]  {warning}")
    return prepared, model_folder


if __name__ == "__main__":
    run_app(app, "data")
