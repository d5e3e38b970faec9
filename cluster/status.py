"""What the cluster is doing, as tables: cards, services, jobs.

Knows the dashboard's HTTP API. Does not change anything.
"""

from typing import Any

import httpx
from rich.table import Table

from cluster.session import Session, answers, is_alive, read_raylets
from configs.errors import ClusterError

NUM_JOBS = 8
MS_PER_S = 1000


def read_status(session: Session) -> list[Table]:
    """Ask the dashboard, and return one table each for cards, services and jobs.

    Raises:
        ClusterError: The dashboard does not answer.
    """
    try:
        with session.dashboard() as client:
            raylets = read_raylets(client)
            served = client.get("/api/serve/applications/").json().get("applications", {})
            jobs = client.get("/api/jobs/").json()
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise ClusterError("the dashboard does not answer", str(error), "python -m cluster down, then python -m cluster up") from None
    return [_cards(session, raylets), _services(session, served), _jobs(jobs)]


def _cards(session: Session, raylets: list[dict[str, Any]]) -> Table:
    table = Table("card", "pool", "accelerator", "memory", "state", title="cards", title_justify="left", box=None, pad_edge=False)
    alive = {raylet.get("labels", {}).get("card") for raylet in raylets if is_alive(raylet)}
    for card in session.cards:
        state = "up" if card["card"] in alive else "[red]gone[/]"
        table.add_row(card["card"], card["pool"], card["accelerator"], f"{card['memory-gib']} GiB", state)
    return table


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


def _jobs(jobs: list[dict[str, Any]]) -> Table:
    table = Table("job", "state", "took", "command", title="\njobs", title_justify="left", box=None, pad_edge=False)
    submitted = [job for job in jobs if job.get("submission_id")]
    for job in sorted(submitted, key=lambda entry: -(entry.get("start_time") or 0))[:NUM_JOBS]:
        seconds = f"{(job['end_time'] - job['start_time']) / MS_PER_S:.0f} s" if job.get("end_time") else ""
        table.add_row(job["submission_id"], job["status"].lower(), seconds, job["entrypoint"])
    if not submitted:
        table.add_row("none", "", "", "")
    return table
