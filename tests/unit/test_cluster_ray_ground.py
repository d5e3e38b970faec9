"""What the arbiter makes of Ray's and Serve's answers, as they were seen on a real cluster; and how an engine tells that it is busy."""

import asyncio
import json
import os
import time
from http.server import ThreadingHTTPServer

import pytest

from cluster.activity import ActivityFile, read_activity, tell_to_sleep
from cluster.arbiter import LOST, Driver
from cluster.chat_wish import forget_wish, keep_wish
from cluster.placement import CARDS_VARIABLE, SLEEPING_GIB, as_lent, card_selector, is_usable
from cluster.ray_ground import ENTRYPOINT, RayGround, _bounds, _cards, _chat, _driver, _engines, _is_used, _num_idle_cores
from cluster.rule import Chat
from serve.activity import Noted
from tests.helpers.json_door import JsonDoor, listening


def deployment(fewest: int, most: int) -> dict:
    return {"name": "engine", "autoscaling_config": {"min_replicas": fewest, "max_replicas": most}}


def application(target: int, *states: str, fewest: int = 1, most: int = 2) -> dict:
    replicas = [{"state": state, "pid": os.getpid(), "node_id": "node0", "start_time_s": 5.0} for state in states]
    deployed = {"args": {"use_train_cards": True, "sleeps": True}, "deployments": [deployment(fewest, most)]}
    return {"deployed_app_config": deployed, "deployments": {"engine": {"target_num_replicas": target, "replicas": replicas}}}


def chat_of(found: dict) -> Chat:
    return _chat(found, _engines(found, set()), _bounds(found["deployed_app_config"]))


def test_chat_that_was_asked_for_and_is_not_there_is_lost_until_it_is_deployed_again(home, up):
    """What answers is a dashboard of the test's own, which has forgotten all that was deployed."""
    deployed: list[dict] = []

    class Dashboard(JsonDoor):
        def do_GET(self) -> None:
            empty = {"/api/jobs/": [], "/api/serve/applications/": {"applications": {}}}
            self.send_json(200, empty.get(self.path, {"data": {"summary": [], "nodeLogicalResources": {}}}))

        def do_PUT(self) -> None:
            deployed.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_json(200, {})

    with listening(ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)) as address:
        ground = RayGround(up(dashboard_url=address))
        assert not ground.look().lost_chat, "nobody asked for it"
        wish = {"applications": [{"args": {"use_train_cards": False}, "deployments": [deployment(1, 1)]}]}
        keep_wish(wish)
        assert ground.look().lost_chat
        ground.restore_chat()
        assert deployed == [wish]
        forget_wish()
        assert not ground.look().lost_chat, "it was ended on purpose"
        ground.restore_chat()
        assert deployed == [wish]


def test_a_joined_machines_card_that_is_lost_is_seen_as_gone_and_one_that_left_is_not(home, up):
    """Or else nobody who watches hears of it: a card that is not seen has no `tandem_card_up`."""

    def node(card: str, state: str, reason: str = "") -> dict:
        labels = {"machine": "desk", "card": card, "pool": "train", "memory-gib": "8"}
        told = {"state": state, "nodeId": card, "labels": labels if state == "ALIVE" else {}, "deathInfo": {"reason": reason}}
        return {"raylet": told}

    summary = [node("desk-card0", "ALIVE"), node("desk-card1", "ALIVE")]

    class Dashboard(JsonDoor):
        def do_GET(self) -> None:
            empty = {"/api/jobs/": [], "/api/serve/applications/": {"applications": {}}}
            self.send_json(200, empty.get(self.path, {"data": {"summary": summary, "nodeLogicalResources": {}}}))

    def joined() -> dict[str, bool]:
        return {card.name: card.is_alive for card in ground.look().cards if card.name.startswith("desk")}

    with listening(ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)) as address:
        ground = RayGround(up(dashboard_url=address))
        assert joined() == {"desk-card0": True, "desk-card1": True}
        summary[:] = [node("desk-card0", "DEAD", "UNEXPECTED_TERMINATION"), node("desk-card1", "DEAD", "EXPECTED_TERMINATION")]
        assert joined() == {"desk-card0": False}


@pytest.mark.parametrize(
    ("job", "driver"),
    [
        ({"status": "PENDING"}, Driver("alive")),
        ({"status": "RUNNING"}, Driver("alive")),
        ({"status": "STOPPED", "driver_exit_code": None}, Driver("stopped")),
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, Driver("ended", 0)),
        ({"status": "FAILED", "driver_exit_code": 2}, Driver("ended", 2)),
        ({"status": "FAILED", "driver_exit_code": None}, Driver("ended", LOST)),
    ],
)
def test_a_jobs_process_is_told_by_its_status(job, driver):
    assert _driver(job) == driver


def test_a_card_is_in_use_by_what_ray_tells_of_its_resources():
    assert _is_used("1.0/1.0 CPU\n1.0/1.0 card\n0B/11.77GiB memory")
    assert _is_used("0.0/1.0 CPU\n0.5/1.0 card (0.5 used of 1.0 reserved in placement groups)")
    assert not _is_used("1.0/1.0 CPU\n0.0/1.0 card\n0B/11.77GiB memory")
    assert not _is_used("1.0/1.0 CPU")


def test_chat_is_what_the_user_deployed_whatever_bounds_are_in_force(home):
    keep_wish({"applications": [{"args": {"use_train_cards": False}, "deployments": [deployment(1, 3)]}]})
    found = chat_of(application(1, fewest=0, most=1))
    assert (found.min_engines, found.max_engines, found.uses_train_cards, found.num_wanted) == (1, 3, False, 1)


def test_chat_is_quiet_when_no_engine_is_wanted_and_busy_when_one_is_and_none_answers(home):
    assert chat_of(application(0)).quiet_s == float("inf")
    assert chat_of(application(1, "STARTING")).quiet_s == 0
    assert chat_of(application(1, "RUNNING")).quiet_s == 0, "nothing is known of its requests"


def test_an_engine_tells_of_its_requests_but_not_of_looks_at_it(home):
    inside = asyncio.Event()
    goes_on = asyncio.Event()

    async def app(scope, receive, send):
        inside.set()
        await goes_on.wait()

    async def tell() -> None:
        noted = Noted(app, ActivityFile())
        await asyncio.sleep(0.05)
        assert chat_of(application(1, "RUNNING")).quiet_s >= 0.05
        for method, is_busy in (("GET", False), ("POST", True)):
            inside.clear()
            goes_on.clear()
            request = asyncio.create_task(noted({"type": "http", "method": method}, None, None))
            await inside.wait()
            time.sleep(0.01)
            assert (read_activity(os.getpid()).quiet_s == 0) == is_busy
            goes_on.set()
            await request
        time.sleep(0.01)
        assert 0 < read_activity(os.getpid()).quiet_s < 5

    asyncio.run(tell())


def test_an_engine_that_sleeps_leaves_its_card_is_wanted_when_it_is_called_and_is_told_once(home):
    labels = {"card": "card0", "pool": "serve", "memory-gib": "8"}
    raylets = [{"nodeId": "node0", "state": "ALIVE", "labels": labels}]
    found, file = application(1, "RUNNING"), ActivityFile()

    def stands() -> tuple[float | None, bool, bool, int]:
        (card,) = _cards([labels], raylets, _engines(found, set()), set())
        return card.engine_since_s, card.is_seated, card.is_called, chat_of(found).num_wanted

    awake = (5.0, True, False, 1)
    assert stands() == awake, "one that has told nothing yet may have its card"
    for state, expected in (("waiting", (None, True, True, 1)), ("awake", awake), ("asleep", (None, True, False, 0))):
        file.tell(state)
        assert stands() == expected, state
    assert not file.is_told_to_sleep()
    assert (tell_to_sleep(os.getpid()), tell_to_sleep(os.getpid())) == (True, False)
    assert (file.is_told_to_sleep(), file.is_told_to_sleep()) == (True, False)


def test_an_engine_answers_when_it_runs_and_has_its_card(home, up):
    """What answers is a dashboard of the test's own; by `num_answering` somebody is woken when chat is gone."""
    found: dict = {}
    proxies = {"node0": {"status": "HEALTHY"}}

    class Dashboard(JsonDoor):
        def do_GET(self) -> None:
            served = {"applications": {"chat": found} if found else {}, "proxies": proxies}
            told = {"/api/jobs/": [], "/api/serve/applications/": served}
            self.send_json(200, told.get(self.path, {"data": {"summary": [], "nodeLogicalResources": {}}}))

    with listening(ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)) as address:
        ground = RayGround(up(dashboard_url=address))

        def stands() -> tuple[int, int]:
            seen = ground.look()
            return seen.chat.num_wanted, seen.num_answering

        assert stands() == (0, 0), "there is no chat"
        for told, expected in (
            (application(0), (0, 0)),
            (application(1, "STARTING"), (1, 0)),
            (application(2, "RUNNING", "STOPPING"), (2, 1)),
            ({**application(1), "deployments": {}}, (1, 0)),  # it could not be begun
        ):
            found.update(told)
            assert stands() == expected
        found.update(application(1, "RUNNING"))
        file = ActivityFile()
        for state, expected in (("unknown", (1, 1)), ("awake", (1, 1)), ("asleep", (0, 0)), ("waiting", (1, 0))):
            file.tell(state)
            assert stands() == expected, state
        file.tell("awake")
        for status, num_answering in (("UNHEALTHY", 0), ("STARTING", 0), ("HEALTHY", 1)):
            proxies["node0"]["status"] = status
            assert stands() == (1, num_answering), "no engine is reached without a proxy"


def test_among_many_requests_only_the_first_and_the_last_are_written(home, monkeypatch):
    file, written, write = ActivityFile(), [], os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *what: written.append(what) or write(*what))
    for _ in range(3):
        file.begin()
    file.end()
    file.end()
    assert read_activity(os.getpid()).quiet_s == 0
    assert len(written) == 1
    file.end()
    time.sleep(0.01)
    assert read_activity(os.getpid()).quiet_s > 0
    assert len(written) == 2


def test_a_state_is_no_request(home):
    file = ActivityFile()
    file.begin()
    file.end()
    time.sleep(0.05)
    file.tell("asleep")
    assert read_activity(os.getpid()).quiet_s >= 0.05


def test_a_serve_cards_gpu_is_lent_without_what_a_sleeping_engine_keeps():
    serve, train = {"pool": "serve", "memory-gib": "31", "gpu-share": "1"}, {"pool": "train", "memory-gib": "15", "gpu-share": "1"}
    assert float(as_lent(serve, "auto")["memory-gib"]) == 31 - SLEEPING_GIB
    assert as_lent(serve, "stop") == serve
    assert as_lent(train, "auto") == train
    on_cpu = {"pool": "serve", "memory-gib": "8"}
    assert as_lent(on_cpu, "sleep") == on_cpu


def test_where_cards_have_their_own_cores_none_is_idle_for_a_job_that_gets_ready(monkeypatch):
    """It would take those of the chat whose card it will have."""
    monkeypatch.setattr("cluster.ray_ground.num_idle_cores", lambda: 9.0)
    assert _num_idle_cores([{"card": "card0"}, {"card": "card1"}]) == 9.0
    assert _num_idle_cores([{"card": "card0", "own-cores": "3"}, {"card": "card1"}]) == 0.0


def test_a_process_trains_on_the_cards_that_it_was_given(monkeypatch):
    labels = {"card": "card0", "pool": "serve"}, {"card": "card1", "pool": "train"}, {"card": "card2", "pool": "train"}
    assert card_selector() == {"pool": "train"}
    assert [is_usable(found) for found in labels] == [False, True, True]
    monkeypatch.setenv(CARDS_VARIABLE, "card0")
    assert card_selector() == {"card": "card0"}
    assert [is_usable(found) for found in labels] == [True, False, False]
    monkeypatch.setenv(CARDS_VARIABLE, "card0,card2")
    assert card_selector() == {"card": "in(card0,card2)"}
    assert [is_usable(found) for found in labels] == [True, False, True]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", "it said nothing"),
        (f"{ENTRYPOINT} a: cd /x && exec python\n", "it said nothing"),
        (f"{ENTRYPOINT} a: cd /x\ntrain  step 3/8\n\n", "train  step 3/8"),
        ("error: no room\n  why\nat exit\n", "error: no room"),
    ],
)
def test_the_words_of_a_job_are_its_own(home, up, said, expected):
    class Dashboard(JsonDoor):
        def do_GET(self) -> None:
            self.send_json(200, {"logs": said})

    with listening(ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)) as address:
        assert RayGround(up(dashboard_url=address)).words("a") == expected
