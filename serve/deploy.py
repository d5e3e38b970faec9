"""Puts the chat application into the cluster, through Serve's declarative API, and looks at it.

Knows the dashboard's HTTP API. Does not import Ray, which would take seconds.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx

from cluster.chat_wish import keep_wish, wish_lock
from cluster.models import check_model, ensure_model, served_base_name
from cluster.placement import HEAD
from cluster.processes import port_owner
from cluster.session import Session, is_alive, joined_cards, read_raylets
from configs.errors import AccessError, ClusterError, last_lines
from configs.schema import ChatbotConfig, ServeConfig, is_loopback
from data.feedback_store import check_store
from serve.keys import KeyFile

APPLICATION, DEPLOYMENT = "chat", "engine"
BEHIND_HAPROXY = ("127.0.0.1", "localhost", "0.0.0.0")  # noqa: S104 (names, not sockets)
API = "/api/serve/applications/"
POLL_S = 0.5
START_TIMEOUT_S = 900
METRICS_INTERVAL_S = 1.0  # how often a replica tells its requests in flight
LOOK_BACK_S = 5.0  # they are averaged over so long
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


def deploy(config: ChatbotConfig, session: Session, say: Callable[[str], None], wait: bool = True) -> str:
    """Serve a chatbot's base model and every adapter for it; return the endpoint's address.

    Idempotent: the same config again changes nothing, another one takes the place of the last.

    Raises:
        AccessError: Others could reach the address, and there is no key.
        ClusterError: The port is taken, the database for feedback cannot be opened, or the engine did not start.
        ModelError: The base model cannot be had.
    """
    _require_keys(config)
    _require_host(config, session)
    check_store()
    check_model(config.model)
    with _dashboard(session) as client:
        _require_port(config, _details(client))
        raylets = read_raylets(client)
        num_cards = _num_cards(config, raylets, only_head(config, session))
    session = replace(session, cards=(*session.cards, *joined_cards(raylets)))
    say("fetching the base model")
    ensure_model(config.model)  # here, where its progress and its errors are seen, and not in the replica
    with _dashboard(session) as client, wish_lock():
        if _status(client) in FAILED:
            # Serve would say the same again without trying: to it, the same application is no news.
            client.delete(API)
        wish = _wanted(config, session, num_cards)
        answer = client.put(API, json=wish)
        if answer.is_success:
            keep_wish(wish)
    if answer.is_error:
        raise ClusterError("Ray Serve refused the application", last_lines(answer.text), "python -m cluster status")
    if wait:
        wait_until_running(session, say)
    return endpoint(config)


def _require_keys(config: ChatbotConfig) -> None:
    """Refuse an address that others can reach while everyone there could ask."""
    host = config.serve.host
    if not is_loopback(host) and not any(key.is_valid() for key in KeyFile().read()):
        why = "others can reach that address, and there is no key: everyone there could ask"
        raise AccessError(f"serve.host={host} is not served", why, "python -m serve keys create NAME, or serve.host=127.0.0.1")


def _require_host(config: ChatbotConfig, session: Session) -> None:
    """Refuse an address at which HAProxy would look for the engines in vain: it asks those of its own machine at 127.0.0.1."""
    host = config.serve.host
    if session.has_haproxy and host not in BEHIND_HAPROXY:
        remedy = "serve.host=0.0.0.0, or python -m cluster down, and up again with http_proxy=python"
        raise ClusterError(f"serve.host={host} is not served", f"behind HAProxy it is one of {', '.join(BEHIND_HAPROXY)}", remedy)


def only_head(config: ChatbotConfig, session: Session) -> bool:
    """Whether engines must be on the head: HAProxy's connections reach no other machine's loopback."""
    return session.has_haproxy and is_loopback(config.serve.host)


def _num_cards(config: ChatbotConfig, raylets: list[dict[str, Any]], on_head: bool) -> int:
    """Return how many cards engines may take; refuse fewer than those that must run."""
    scaling = config.serve.scaling
    pools = ("serve", "train") if scaling.use_train_cards else ("serve",)
    usable: list[dict[str, str]] = [
        raylet.get("labels", {}) for raylet in raylets if is_alive(raylet) and raylet.get("labels", {}).get("pool") in pools
    ]
    found = sum(not on_head or labels.get("machine", HEAD) == HEAD for labels in usable)
    if found < max(1, scaling.min_replicas):
        why = f"each engine takes a card, and there {'is' if found == 1 else 'are'} {found} of {' and '.join(pools)}"
        remedy = "a smaller serve.scaling.min_replicas, more cards, or serve.scaling.use_train_cards=true"
        if len(usable) > found:
            why += f", and {len(usable) - found} of machines that joined, whose engines are reached only where the endpoint is open"
            remedy = "python -m serve keys create NAME, then serve.host=0.0.0.0"
        raise ClusterError(f"serve.scaling.min_replicas={scaling.min_replicas} engines cannot run", why, remedy)
    return found


def _require_port(config: ChatbotConfig, running: dict[str, Any]) -> None:
    """Refuse a port that another process holds, or one that a running Ray Serve would quietly not move to."""
    port, current = config.serve.port, (running.get("http_options") or {}).get("port")
    if running.get("applications"):
        if current not in (None, port):
            why = "Ray Serve keeps its port while it runs"
            raise ClusterError(f"chat is served on port {current} already", why, f"serve.port={current}, or python -m cluster down first")
    elif owner := port_owner(config.serve.host, port):
        remedy = f"end that process, or choose another port: serve.port={port + 1}"
        raise ClusterError("a port is taken", f"port {port} (serve.port) is held by {owner}", remedy)


def endpoint(config: ChatbotConfig) -> str:
    """Return the address of the OpenAI-compatible endpoint."""
    return f"http://{config.serve.host}:{config.serve.port}/v1"


def wait_until_running(session: Session, say: Callable[[str], None]) -> None:
    """Wait until the application answers.

    Raises:
        ClusterError: It failed, or took too long.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_running(session):
        if time.monotonic() > deadline:
            raise _not_started(*application_status(session))
        say("the engine is starting")
        time.sleep(POLL_S)


def is_running(session: Session) -> bool:
    """Whether the application answers.

    Raises:
        ClusterError: It has failed for good.
    """
    status, reason = application_status(session)
    if status in FAILED:
        raise _not_started(status, reason)
    return status == "RUNNING"


def _not_started(status: str, reason: str) -> ClusterError:
    return ClusterError(f"the engine did not start ({status})", reason, "python -m serve CONFIG, with the reason mended")


def failure_reason(application: dict[str, Any]) -> str:
    """Return the last lines of what Serve says of a failed application."""
    deployments = application.get("deployments", {}).values()
    messages = [application.get("message", ""), *(entry.get("message", "") for entry in deployments)]
    return last_lines(max(messages, key=len))


def application_status(session: Session) -> tuple[str, str]:
    """Return the application's status and message; NOT_STARTED where there is none."""
    with _dashboard(session) as client:
        application = _application(client)
    return application.get("status", "NOT_STARTED"), failure_reason(application) if application else ""


def engine_states(session: Session) -> Counter[str]:
    """Return how many engines are in each of Serve's states; none where chat sleeps, or was never started."""
    with _dashboard(session) as client:
        deployments = _application(client).get("deployments", {})
    return Counter(replica["state"] for deployment in deployments.values() for replica in deployment.get("replicas", []))


def _status(client: httpx.Client) -> str:
    return str(_application(client).get("status", "NOT_STARTED"))


def _application(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = _details(client).get("applications", {}).get(APPLICATION, {})
    return found


@contextmanager
def _dashboard(session: Session) -> Iterator[httpx.Client]:
    try:
        with session.dashboard() as client:
            yield client
    except httpx.HTTPError as error:
        raise ClusterError("the dashboard does not answer", str(error), "python -m cluster down, then python -m cluster up") from None


def _details(client: httpx.Client) -> dict[str, Any]:
    answer = client.get(API)
    if answer.is_error:
        raise ClusterError("Ray Serve does not answer", answer.text[:500], "python -m cluster status")
    details: dict[str, Any] = answer.json()
    return details


def _wanted(config: ChatbotConfig, session: Session, num_cards: int) -> dict[str, Any]:
    cards = [card for card in session.cards if card["pool"] == "serve" or config.serve.scaling.use_train_cards]
    shares = [float(card["gpu-share"]) for card in cards if "gpu-share" in card]
    gpu_share, on_head = min(shares) if shares else None, only_head(config, session)
    sleeps = _can_sleep(config, session, gpu_share is not None) and min(config.serve.scaling.max_replicas, num_cards) == 1
    sleeps = sleeps and (on_head or all(card.get("machine", HEAD) == HEAD for card in cards))
    return serve_application(config, gpu_share, num_cards, on_head or sleeps, sleeps)


def _can_sleep(config: ChatbotConfig, session: Session, on_gpu: bool) -> bool:
    """Whether engines keep their process while their card is lent, as far as the configs say; the arbiter tells those of the head alone.

    Not where they may be guests on train cards: Ray places those that can sleep by their seats, and there is one where a job runs too. Nor
    where there may be several: a request would go to the one that sleeps as soon as to one that is awake.
    """
    lending = session.lending
    is_wanted = lending.idle_engine == "sleep" or (lending.idle_engine == "auto" and on_gpu)
    return lending.enabled and is_wanted and not config.serve.scaling.use_train_cards


def serve_application(
    config: ChatbotConfig, gpu_share: float | None, num_cards: int, on_head: bool = False, sleeps: bool = False
) -> dict[str, Any]:
    """Return what Ray Serve is to run, in the form of its declarative API.

    Args:
        config: The chatbot.
        gpu_share: The part of a GPU that a card is; None for cards without one.
        num_cards: How many cards engines may take.
        on_head: Whether engines must be on the head.
        sleeps: Whether engines can sleep.
    """
    arguments = {
        "model": config.model.model_dump(mode="json"),
        "serve": config.serve.model_dump(mode="json", exclude={"scaling"}),
        "base_name": served_base_name(config.model.name),
        "gpu_share": gpu_share,
        "use_train_cards": config.serve.scaling.use_train_cards,
        "only_head": on_head,
        "sleeps": sleeps,
    }
    application = {"name": APPLICATION, "route_prefix": "/", "import_path": "serve.app:build", "args": arguments}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": config.serve.host, "port": config.serve.port},
        "applications": [{**application, "deployments": [{"name": DEPLOYMENT, "autoscaling_config": _growth(config.serve, num_cards)}]}],
    }


def _growth(config: ServeConfig, num_cards: int) -> dict[str, Any]:
    """Return what Serve grows and shrinks by; also where the number is fixed, since Serve would replace every engine at the change."""
    scaling = config.scaling
    return {
        "min_replicas": scaling.min_replicas,
        "initial_replicas": max(1, scaling.min_replicas),
        "max_replicas": min(scaling.max_replicas, num_cards),
        "target_ongoing_requests": scaling.requests_per_replica or config.max_num_seqs,
        "upscale_delay_s": scaling.up_after_s,
        "downscale_delay_s": scaling.down_after_s,
        "metrics_interval_s": METRICS_INTERVAL_S,
        "look_back_period_s": LOOK_BACK_S,
    }
