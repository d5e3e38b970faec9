"""`python -m cluster up|join|leave|down|status|doctor|plan|submit|...`: the stack, what fits its cards, jobs, and deployment elsewhere."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster.deploy_commands import add_commands
from cluster.home import home_folder, log_folder
from cluster.job_queue import Queue
from cluster.models import read_config_file, read_model_config
from cluster.session import read_session, refuse_joined, require_session, token_file
from cluster.stack import start, stop
from configs.cli import Overrides, console, make_app, run_app
from configs.errors import ClusterError, ConfigError, ModelError
from configs.loader import load_chatbot, load_machine
from configs.schema import is_loopback

app = make_app("Start, look at and end the cluster on this machine.")
Machine = Annotated[str, typer.Argument(metavar="MACHINE", help="File, or a name in configs/machines.")]
JobNumber = Annotated[int, typer.Argument(metavar="JOB", help="Its number in `python -m cluster queue`.")]


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
    if not is_loopback(config.listen_host):
        console.print(f"    machines   python -m cluster join {config.listen_host}:{config.mlflow_port}, with the same token")


@app.command()
def join(
    head: Annotated[str, typer.Argument(metavar="HEAD_ADDRESS", help="HOST or HOST:PORT, as `up` told it there.")],
    machine: Machine = "auto",
    overrides: Overrides = None,
) -> None:
    """Bring this machine's cards into the cluster of another, whose token is here: in TANDEM_TOKEN, or as a copy of its file."""
    from cluster.join import head_gate, own_address
    from cluster.join import join as join_head

    gate = head_gate(head)
    config = load_machine(machine, [f"listen_host={own_address(gate)}", *(overrides or [])])
    with console.status("joining the cluster") as spinner:
        session = join_head(gate, config, lambda step: spinner.update(f"{step} ..."))
    console.print(f"[green]joined[/]  {session.machine_name}: {', '.join(card['card'] for card in session.cards)}")
    console.print(f"    dashboard  {session.dashboard_url}\n    logs       {log_folder()}\n    to end it  python -m cluster leave")


@app.command()
def leave() -> None:
    """End what `join` started here; the cluster goes on without this machine's cards."""
    if (session := read_session()) and not session.head:
        raise ClusterError("this machine joined no cluster", "it is the head of one", "python -m cluster down ends it")
    down()


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

    session = require_session(only_head=False)
    for table in read_status(session):
        console.print(table)


@app.command()
def logs(
    streams: Annotated[
        list[str] | None, typer.Argument(metavar="[STREAM]...", help="training, inference, system, api; all, if empty.")
    ] = None,
    last: Annotated[int, typer.Option(min=0, help="Newest lines to show.")] = 20,
    find: Annotated[str, typer.Option(metavar="TEXT", help="Only lines with this in them, such as a request's id.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as new lines come, until Ctrl-C.")] = False,
) -> None:
    """Show what was logged: coloured on a terminal, else one JSON object a line."""
    from cluster.log_view import show

    show(streams or [], last, find, follow)


@app.command()
def submit(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The chatbot's YAML file; later edits do not change the job.")],
    overrides: Overrides = None,
    priority: Annotated[int, typer.Option(help="The higher goes before, among training and among sweeps.")] = 0,
    sweep: Annotated[bool, typer.Option("--sweep", help="Search for better settings, as `python -m tune` does.")] = False,
    memory_gib: Annotated[float, typer.Option("--memory-gib", min=0, help="Least memory of a card that will do, in GiB.")] = 0.0,
) -> None:
    """Put a training run or a sweep in line for a card; it starts by itself, and goes on after a restart of the cluster."""
    from cluster.queue_view import check_job

    session = read_session()
    refuse_joined(session)
    new = check_job(config, overrides or [], sweep, session)
    new = replace(new, priority=priority, memory_gib=max(memory_gib, new.memory_gib))
    with Queue() as line:
        job = line.submit(new)
    until = "" if session else "; it waits for: python -m cluster up"
    console.print(f"[green]submitted[/]  job {job.id}, {job.kind} of {job.chatbot}{until}. See: python -m cluster queue")


@app.command()
def queue() -> None:
    """Show who runs, who waits and why."""
    from cluster.queue_view import queue_table

    refuse_joined(read_session())
    with Queue() as line:
        table = queue_table(line)
    console.print(table if table.row_count else "no jobs; python -m cluster submit CONFIG")


@app.command()
def cancel(job: JobNumber) -> None:
    """Take a job out of the line; one that runs saves its state and leaves."""
    refuse_joined(read_session())
    with Queue() as line:
        left = line.cancel(job)
    module = "tune" if left.kind == "sweep" else "train"
    again = f"; what it saved goes on with: python -m {module} CONFIG --resume {left.run_id}" if left.run_id else ""
    console.print(f"[green]{left.state}[/]  job {job}{again}")


@app.command()
def move(
    job: JobNumber,
    priority: Annotated[int | None, typer.Option(help="Its new priority.")] = None,
    before: Annotated[int | None, typer.Option(metavar="JOB", help="Put it just before this one.")] = None,
) -> None:
    """Give a job another place in the line."""
    if (priority is None) == (before is None):
        raise ClusterError("one of --priority and --before is wanted", remedy=f"python -m cluster move {job} --priority 1")
    refuse_joined(read_session())
    with Queue() as line:
        moved = line.move(job, priority, before)
    console.print(f"[green]moved[/]  job {job}, priority {moved.priority}. See: python -m cluster queue")


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


@app.command()
def plan(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The chatbot's YAML file.")],
    overrides: Overrides = None,
    cards: Annotated[str | None, typer.Option(metavar="NAME:GIB,...", help="Other cards than this machine's.")] = None,
    machine: Annotated[str, typer.Option(metavar="MACHINE", help="File, or a name in configs/machines.")] = "auto",
    model_config: Annotated[str | None, typer.Option(metavar="FILE", help="A config.json in the place of the model's own.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="First train some steps on this machine's train card.")] = False,
) -> None:
    """Tell what fits on each card, how fast it is, and which card should do what; needs no cluster. Exit status 1: a job fits nowhere."""
    from cluster.assign import assign, offers_of
    from cluster.plan_table import make_tables, show_assignment, show_model
    from cluster.shape import read_shape
    from cluster.survey import find_places, measure_places, parse_cards

    settings = load_chatbot(config, overrides or [])
    if cards and measure:
        raise ConfigError("--measure takes no --cards", "it measures a card of this machine", "leave out one of them")
    try:
        model = read_config_file(Path(model_config)) if model_config else read_model_config(settings.model)
    except ModelError as error:
        raise ModelError(error.what, error.why, f"{error.remedy}; or --model-config FILE, such as one of configs/shapes") from None
    shape = read_shape(model, model_config or settings.model.name)
    if measure:
        with console.status("training some steps"):
            places, words = measure_places(load_machine(machine), settings, shape, model)
        console.print(words)
    else:
        precision = settings.model.precision
        places = parse_cards(cards, precision) if cards else find_places(load_machine(machine), precision)
    offers = [offers_of(shape, settings, place) for place in places]
    best = assign(offers, max(1, settings.serve.scaling.min_replicas))
    for line in (show_model(shape, settings), *make_tables(shape, settings, offers), "", *show_assignment(best, settings)):
        console.print(line)
    raise typer.Exit(not best.fits)


add_commands(app)


if __name__ == "__main__":
    run_app(app, "cluster")
