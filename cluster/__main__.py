"""`python -m cluster up|down|status|doctor`: the stack on this machine."""

from typing import Annotated

import typer
from rich.table import Table

from cluster.home import home_folder
from cluster.session import read_session, require_session, token_file
from cluster.stack import start, stop
from configs.cli import Overrides, console, make_app, run_app
from configs.loader import load_machine

app = make_app("Start, look at and end the cluster on this machine.")
Machine = Annotated[str, typer.Argument(help="File, or a name in configs/machines.")]


@app.command()
def up(machine: Machine = "auto", overrides: Overrides = None) -> None:
    """Start a raylet for each card, and MLflow; what runs already is left alone."""
    config = load_machine(machine, overrides or [])
    before = read_session()
    with console.status("starting the cluster") as spinner:
        session = start(config, lambda step: spinner.update(f"{step} ..."), named=machine)
    console.print(f"[green]up[/]  {len(session.cards)} cards{' (was up already)' if session == before else ''}")
    console.print(f"    dashboard  {session.dashboard_url}\n    MLflow     {session.mlflow_url}")
    console.print(f"    token      {token_file()}; for Ray's own commands: source {home_folder() / 'env'}")


@app.command()
def down() -> None:
    """End what `up` started, and nothing else."""
    with console.status("ending the cluster"):
        num_ended = stop()
    console.print(f"[green]down[/]  {num_ended} processes ended" if num_ended else "nothing to end: the cluster is not up")


@app.command()
def status() -> None:
    """Show cards, services and jobs."""
    from cluster.status import read_status

    session = require_session()
    for table in read_status(session):
        console.print(table)


@app.command()
def doctor(machine: Machine = "auto", overrides: Overrides = None) -> None:
    """Check the machine, with a remedy on each line that fails; exit status 1 if one does."""
    from cluster.doctor import examine

    findings = examine(load_machine(machine, overrides or []))
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}
    table = Table("", "what", "found", "remedy", box=None, pad_edge=False)
    for finding in findings:
        table.add_row(marks[finding.mark], finding.what, finding.found, finding.remedy)
    console.print(table)
    raise typer.Exit(any(finding.mark == "fail" for finding in findings))


if __name__ == "__main__":
    run_app(app, "cluster")
