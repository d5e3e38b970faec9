"""Machines that joined: the head remembers whose cards were there, since Ray tells of a lost one neither name nor cards.

Knows one file in the head's home folder, which the arbiter writes as it looks. Does not know how a machine joins.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.home import home_folder, write_text
from cluster.kuberay import is_in_pod
from cluster.session import is_alive, is_joined, known_cards

FILE = "machines.json"
LEFT = "EXPECTED_TERMINATION"  # what Ray says of a raylet that was asked to end
Raylets = Sequence[Mapping[str, Any]]


def remember(raylets: Iterable[Mapping[str, Any]]) -> None:
    """Note the raylets of joined machines that are there; those of before stay until others take their cards.

    Pods are not noted: Kubernetes sees to it that one that is lost is replaced, and the other has another name.
    """
    if is_in_pod():
        return
    known = _read()
    seen = {raylet["labels"]["card"]: _kept(raylet) for raylet in raylets if is_alive(raylet) and is_joined(raylet)}
    if any(known.get(card) != kept for card, kept in seen.items()):
        write_text(home_folder() / FILE, json.dumps(known | seen))


def with_lost(raylets: Raylets) -> list[Mapping[str, Any]]:
    """Return the raylets that are there, and those remembered that Ray lost; not such as left, or were of an earlier cluster."""
    alive = [raylet for raylet in raylets if is_alive(raylet)]
    there = {card["card"] for card in known_cards(alive)}
    ends = {raylet.get("nodeId"): (raylet.get("deathInfo") or {}).get("reason") for raylet in raylets if not is_alive(raylet)}
    lost = [kept for card, kept in _read().items() if card not in there and ends.get(kept["nodeId"], LEFT) != LEFT]
    return [*alive, *({**kept, "state": "DEAD"} for kept in lost)]


def _kept(raylet: Mapping[str, Any]) -> dict[str, Any]:
    return {"labels": raylet["labels"], "nodeId": raylet["nodeId"], "nodeManagerAddress": raylet.get("nodeManagerAddress", "")}


def _read() -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((home_folder() / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found
