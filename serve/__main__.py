"""`python -m serve CONFIG|promote|canary|rollback|status|keys`: serve a base model with its adapters, and say what is live."""

import json
import re
from typing import Annotated

import typer
from rich.table import Table

from cluster.registry import Registry
from cluster.session import require_session
from cluster.standing import CANARY
from configs.cli import Overrides, console, make_app, parse_duration_s, run_app
from configs.errors import RegistryError
from configs.loader import load_chatbot

app = make_app("Serve a base model with its adapters, and choose which version is live.", default="run")
keys_app = make_app("Keys for the chat endpoint. As soon as there is one, every request must show a key.")
app.add_typer(keys_app, name="keys")
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
def ui(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The chatbot's YAML file.")] = "configs/helpdesk.yaml",
    overrides: Overrides = None,
) -> None:
    """Show a Gradio page that talks to the endpoint, for teams that build on Gradio; OPENAI_API_KEY is its key."""
    from serve.ui import run_ui

    run_ui(load_chatbot(config, overrides or []))


@app.command(hidden=True)
def application(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The chatbot's YAML file.")],
    overrides: Overrides = None,
    num_cards: Annotated[int, typer.Option(min=1, help="Cards that engines may take.")] = 1,
    gpu: Annotated[bool, typer.Option("--gpu", help="Whether a card is a GPU.")] = False,
) -> None:
    """Print as JSON what Ray Serve is to run, for `python -m cluster manifests`."""
    from serve.deploy import serve_application

    print(json.dumps(serve_application(load_chatbot(config, overrides or []), 1.0 if gpu else None, num_cards)))


@app.command()
def promote(version: VersionName) -> None:
    """Make a version live: requests for the chatbot's name go to it within two seconds, and no engine restarts."""
    promoted = Registry(require_session().mlflow_url).promote(version)
    console.print(f"[green]live[/]  {promoted.name}")


@app.command()
def canary(version: VersionName, share: Annotated[str, typer.Option(metavar="SHARE", help="Such as 10%.")]) -> None:
    """Let a version answer a share of its chatbot's conversations, each from its beginning to its end; promote or rollback ends it."""
    wanted = parse_share(share)
    started = Registry(require_session().mlflow_url).canary(version, wanted)
    console.print(f"[green]canary[/]  {started.name} answers {share} of the conversations with {started.chatbot}")
    console.print(f"        for all: python -m serve promote {started.name}; for none: python -m serve rollback {started.chatbot}")


@app.command()
def rollback(chatbot: Annotated[str, typer.Argument(metavar="NAME", help="Such as helpdesk.")]) -> None:
    """Undo the last change: end a canary, or make the version live that was live before (a second rollback undoes that)."""
    version = Registry(require_session().mlflow_url).rollback(chatbot)
    console.print(f"[green]live[/]  {version.name} again")


@app.command()
def status() -> None:
    """List versions with their aliases, and whether the engine answers."""
    from serve.deploy import application_status, engine_states

    session = require_session()
    state, reason = application_status(session)
    if state == "RUNNING":
        counts = ", ".join(f"{count} {name.lower()}" for name, count in engine_states(session).items())
        reason = counts or "none, the next request wakes one"
    console.print(f"engines  {state}{f': {reason}' if reason else ''}", markup=False)
    table = Table("version", "aliases", "base", "rank", "data", "held-out loss", "gate", box=None, pad_edge=False)
    for version in Registry(session.mlflow_url).versions():
        loss = json.loads(version.tags.get("scores", "{}")).get("eval_loss")
        table.add_row(
            version.name,
            ", ".join(f"{alias} {version.canary_share * 100:g}%" if alias == CANARY else alias for alias in version.aliases),
            version.tags.get("base_model", ""),
            version.tags.get("rank", ""),
            version.tags.get("data_fingerprint", ""),
            "" if loss is None else f"{loss:.3f}",
            version.tags.get("gate", ""),
        )
    console.print(table)


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")],
    models: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Chatbots, versions or bases that it may use; all, if empty.")
    ] = None,
    rpm: Annotated[int | None, typer.Option(help="Requests a minute; as many as come, if empty.")] = None,
    tpm: Annotated[int | None, typer.Option(help="Tokens a minute, of prompts and answers; as many as come, if empty.")] = None,
    expires: Annotated[str | None, typer.Option(metavar="TIME", help="Such as 30d, 12h or 5m.")] = None,
) -> None:
    """Make a key and show it, once: only its hash is kept."""
    from serve.keys import KeyFile

    allowed = None if models is None else [model.strip() for model in models.split(",")]
    secret = KeyFile().create(name, allowed, parse_duration_s(expires) if expires is not None else None, rpm, tpm)
    console.print(f"[green]key[/]  {secret}", soft_wrap=True)
    console.print("     shown this once; send it as: Authorization: Bearer KEY")


@keys_app.command("list")
def list_keys() -> None:
    """List the keys, without their secrets."""
    from serve.keys import KeyFile, day

    table = Table("name", "may use", "requests/min", "tokens/min", "made", "expires", "state", box=None, pad_edge=False)
    for key in KeyFile().read():
        state = "valid" if key.is_valid() else "revoked" if key.revoked else "expired"
        quotas = [str(limit or "") for limit in (key.rpm, key.tpm)]
        table.add_row(key.name, ", ".join(key.models or ("all",)), *quotas, day(key.created_s), day(key.expires_s), state)
    console.print(table if table.row_count else "no keys: on loopback, everyone may ask")


@keys_app.command("revoke")
def revoke_key(name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")]) -> None:
    """Close a key for good; it is out within a quarter of a second, on machines that joined within two."""
    from serve.keys import KeyFile

    KeyFile().revoke(name)
    console.print(f"[green]revoked[/]  {name}")


def parse_share(text: str) -> float:
    """Return the share, over 0 and under 1, that `10%` or `0.1` means."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text)
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share < 1:
        raise RegistryError(f"{text!r} is no share", "a share is over 0 % and under 100 %", "--share 10%")
    return share


if __name__ == "__main__":
    run_app(app, "serve")
