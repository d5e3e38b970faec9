"""What the cluster is doing, as tables: cards and who has them, services, jobs.

Knows the dashboard's HTTP API. Does not change anything.
"""

import time
from collections.abc import Mapping, Set
from typing import Any

import httpx
from rich.table import Table

from cluster.activity import read_activity
from cluster.job_queue import LEAVING, RUNNING, WAITING, Queue
from cluster.machines import Raylets, with_lost
from cluster.session import Session, answers, is_alive, known_cards, read_raylets
from configs.errors import ClusterError

NUM_JOBS = 8
NUM_HANDOVERS = 8
MS_PER_S = 1000


def read_status(session: Session) -> list[Table]:
    """Ask the dashboard, and return one table each for cards, services and jobs.

    Raises:
        ClusterError: The dashboard does not answer.
    """
    try:
        with session.dashboard() as client:
            raylets = with_lost(read_raylets(client))
            served = client.get("/api/serve/applications/").json().get("applications", {})
            jobs = client.get("/api/jobs/").json()
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise ClusterError("the dashboard does not answer", str(error), "python -m cluster down, then python -m cluster up") from None
    with Queue() as queue:
        holders = {**_engine_holders(raylets, served), **_job_holders(queue)}
        handovers = queue.handovers(NUM_HANDOVERS)
        ready = {job.submission for job in queue.jobs(WAITING)}
    tables = [_cards(session, raylets, holders), _services(session, served), _jobs(jobs, ready)]
    if machines := _machines(raylets):
        tables.insert(0, machines)
    return [*tables, _handovers(handovers)] if handovers else tables


def _cards(session: Session, raylets: Raylets, holders: Mapping[str, tuple[str, float, str]]) -> Table:
    columns = ("card", "pool", "accelerator", "memory", "held by", "since", "why", "state")
    table = Table(*columns, title="cards", title_justify="left", box=None, pad_edge=False)
    alive = {raylet.get("labels", {}).get("card") for raylet in raylets if is_alive(raylet)}
    own = {card["card"] for card in session.cards}
    others = [card for card in known_cards(raylets) if card["card"] not in own]
    for card in (*session.cards, *others):
        state = "up" if card["card"] in alive else "[red]gone[/]"
        holder, since_s, why = holders.get(card["card"], ("", 0.0, ""))
        table.add_row(
            card["card"],
            card["pool"],
            card["accelerator"],
            f"{card['memory-gib']} GiB",
            holder,
            _clock(since_s) if holder else "",
            why,
            state,
        )
    return table


def _machines(raylets: Raylets) -> Table | None:
    """Show the machines where more than one was there."""
    cards = known_cards(raylets)
    names = dict.fromkeys(card["machine"] for card in cards)
    if len(names) < 2:
        return None
    labelled = [raylet for raylet in raylets if "machine" in raylet.get("labels", {})]
    alive = {raylet["labels"]["machine"] for raylet in labelled if is_alive(raylet)}
    address = {raylet["labels"]["machine"]: raylet.get("nodeManagerAddress", "") for raylet in labelled}
    table = Table("machine", "address", "cards", "state", title="machines", title_justify="left", box=None, pad_edge=False)
    for name in names:
        own = ", ".join(card["card"] for card in cards if card["machine"] == name)
        table.add_row(name, address[name], own, "up" if name in alive else "[red]gone[/]")
    table.add_row()
    return table


def _engine_holders(raylets: Raylets, served: Mapping[str, Any]) -> dict[str, tuple[str, float, str]]:
    card_of = {raylet.get("nodeId"): raylet.get("labels", {}).get("card", "") for raylet in raylets}
    deployments = [entry for application in served.values() for entry in application.get("deployments", {}).values()]
    return {
        card_of[engine["node_id"]]: ("chat", float(engine["start_time_s"]), f"an engine, {engine['state'].lower()}")
        for deployment in deployments
        for engine in deployment.get("replicas", [])
        if engine.get("node_id") in card_of and read_activity(engine.get("pid") or 0).has_card
    }


def _job_holders(queue: Queue) -> dict[str, tuple[str, float, str]]:
    jobs = queue.jobs(RUNNING, LEAVING)
    return {card: (f"job {job.id} ({job.chatbot}), {job.state}", job.since_s, job.reason) for job in jobs for card in job.cards}


def _handovers(handovers: list[tuple[float, str, str, str]]) -> Table:
    table = Table("time", "card", "what", "why", title="\nhandovers", title_justify="left", box=None, pad_edge=False)
    for at_s, card, what, why in handovers:
        table.add_row(_clock(at_s), card, what, why)
    return table


def _clock(moment_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(moment_s))


def _services(session: Session, served: dict[str, Any]) -> Table:
    table = Table("service", "address", "state", title="\nservices", title_justify="left", box=None, pad_edge=False)
    table.add_row("dashboard", session.dashboard_url, "up")
    table.add_row("MLflow", session.mlflow_url, "up" if answers(f"{session.mlflow_url}/health") else "[red]does not answer[/]")
    for application in served.values():
        proxy = "HAProxy" if session.has_haproxy else "Ray Serve's proxy"
        table.add_row("chat", _address(application), f"{application['status'].lower()}, through {proxy}")
    if not served:
        table.add_row("chat", "", "not started: python -m serve configs/helpdesk.yaml")
    return table


def _address(application: dict[str, Any]) -> str:
    arguments = (application.get("deployed_app_config") or {}).get("args", {})
    serve = arguments.get("serve", {})
    return f"http://{serve.get('host')}:{serve.get('port')}/v1" if serve else ""


def _jobs(jobs: Raylets, ready: Set[str]) -> Table:
    """Show the newest processes of jobs; `ready` are those that wait for their turn."""
    table = Table("job", "state", "took", "command", title="\njobs", title_justify="left", box=None, pad_edge=False)
    submitted = [job for job in jobs if job.get("submission_id")]
    for job in sorted(submitted, key=lambda entry: -(entry.get("start_time") or 0))[:NUM_JOBS]:
        seconds = f"{(job['end_time'] - job['start_time']) / MS_PER_S:.0f} s" if job.get("end_time") else ""
        state = "waits for cards" if job["submission_id"] in ready else job["status"].lower()
        table.add_row(job["submission_id"], state, seconds, job["entrypoint"])
    if not submitted:
        table.add_row("none", "", "", "")
    return table
