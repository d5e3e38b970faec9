"""The commands for running elsewhere and for keeping what there is: `run`, `healthy`, `manifests`, `backup`, `restore`.

Knows the command line. `cluster.__main__` has the others.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster.home import BYTES_PER_MIB, home_folder
from cluster.session import read_session
from configs.cli import Overrides, console
from configs.errors import ConfigError
from configs.loader import load_chatbot, load_machine
from configs.schema import Environment

if TYPE_CHECKING:
    from cluster.backup import Contents

ArchiveFile = Annotated[Path, typer.Argument(metavar="FILE", help="Such as tandem.tar.gz.")]


def add_commands(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (run, healthy, manifests, backup, restore):
        app.command()(command)


def run(
    part: Annotated[Literal["head", "card", "mlflow"], typer.Argument(metavar="PART", help="The head, a machine with cards, or MLflow.")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[HEAD_ADDRESS] [MACHINE] [KEY=VALUE]...", help="Of a card: whose cluster it joins.")
    ] = None,
) -> None:
    """Run one part in the foreground, as a container does; it ends with SIGTERM, or when the part is not whole any more."""
    from cluster import foreground

    settings = [word for word in words or [] if "=" in word]
    places = [word for word in words or [] if "=" not in word]
    address = places.pop(0) if part == "card" and places and not places[0].endswith(".yaml") else None
    if len(places) > 1:
        raise ConfigError(f"{places[1]!r} is one word too many", "", f"python -m cluster run {part} --help")
    machine = load_machine(places[0] if places else "auto", [f"listen_host={foreground.own_host()}", *settings])
    if part == "head":
        foreground.run_head(machine, print)
    elif part == "card":
        foreground.run_card(address, machine, print)
    else:
        foreground.run_mlflow(machine)


def healthy() -> None:
    """Tell whether what `run`, `up` or `join` started here is whole and known to the cluster; exit status 1 if not. For probes."""
    from cluster.foreground import why_not_whole

    if why := why_not_whole(read_session()):
        console.print(why, markup=False)
    raise typer.Exit(bool(why))


def manifests(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The chatbot's YAML file.")],
    overrides: Overrides = None,
    machine: Annotated[str, typer.Option(metavar="MACHINE", help="File, or a name in configs/machines.")] = "kubernetes",
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where to write them; printed, if empty.")] = None,
) -> None:
    """Make Kubernetes manifests for KubeRay: a cluster, jobs that train and tune, and a service that chats."""
    from cluster.manifests import ask_application, make_manifests, show, write

    chatbot, settings = load_chatbot(config, overrides or []), load_machine(machine)
    made = make_manifests(chatbot, settings, ask_application(config, overrides or [], settings.deploy.serve))
    if out is None:
        print(show([entry for objects in made.values() for entry in objects]), end="")
        return
    for file in write(made, out):
        console.print(f"[green]wrote[/]  {file}", soft_wrap=True)


def backup(file: ArchiveFile) -> None:
    """Write all that cannot be made again into one file, also while the cluster runs; it holds the token and keys, so guard it."""
    from cluster.backup import back_up, kept_elsewhere

    with console.status("copying"):
        held = back_up(file)
    console.print(f"[green]backup[/]  {file}: {_told(held)}")
    for part in kept_elsewhere(Environment()):
        console.print(f"[yellow]not in it[/]  {part} elsewhere: back that up there")


def restore(
    file: ArchiveFile,
    replace: Annotated[bool, typer.Option("--replace", help="Move aside what is in the home folder.")] = False,
) -> None:
    """Put a backup into the home folder, whole or not at all; the cluster must be down."""
    from cluster.restore import restore as put_back

    with console.status("unpacking and checking"):
        held, aside = put_back(file, replace)
    console.print(f"[green]restored[/]  {home_folder()}: {_told(held)}, taken {held.made_at} by Tandem {held.tandem}")
    console.print(f"{f'          what was there lies in {aside}; ' if aside else '          '}now: python -m cluster up")


def _told(held: "Contents") -> str:
    return f"{len(held.files)} files, {held.num_bytes / BYTES_PER_MIB:.1f} MiB"
