"""Parts in the foreground: what is refused before anything starts, and what a health check says."""

import json

from cluster.foreground import why_not_whole
from cluster.session import read_session


def test_a_machine_without_a_cluster_is_not_healthy(command):
    told = command("cluster", "healthy")
    assert (told.status, told.out) == (1, "it is not up\n")


def test_a_cluster_that_is_starting_or_does_not_answer_is_not_healthy(home, up):
    session = up()
    assert why_not_whole(session) == f"nobody answers at {session.dashboard_url}"
    values = json.loads((home / "cluster.json").read_text())
    (home / "cluster.json").write_text(json.dumps({**values, "ready": False}))
    assert why_not_whole(read_session()) == "it is not up"
    gone = {**values["processes"][0], "started_s": 1.0}
    (home / "cluster.json").write_text(json.dumps({**values, "processes": [gone]}))
    assert why_not_whole(read_session()) == "card0 ended"


def test_a_card_wants_to_know_its_head(command, monkeypatch):
    monkeypatch.delenv("FQ_RAY_IP", raising=False)
    refused = command("cluster", "run", "card", "listen_host=10.0.0.1")
    assert (refused.status, "no head is named" in refused.err) == (2, True)


def test_words_that_mean_nothing_are_refused(command):
    refused = command("cluster", "run", "head", "auto", "another", "listen_host=127.0.0.1")
    assert (refused.status, "one word too many" in refused.err) == (2, True)
    wrong = command("cluster", "run", "mlflow", "listen_host=127.0.0.1", "mlflow_prot=5001")
    assert (wrong.status, "mlflow_port" in wrong.err) == (2, True), "the nearest name is told"
