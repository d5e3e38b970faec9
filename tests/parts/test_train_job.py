"""What a run's driver tells of a failure, and when a wish to stop ends it at once; no cluster is needed for either."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError
from ray.train import WorkerGroupError

from cluster.placement import CARDS_VARIABLE
from configs.errors import ClusterError, ModelError
from configs.schema import TrainConfig
from train.driver import on_signals
from train.job import _failure, _watch
from train.standby import Standby, worker_environment

RUN = "0" * 32
SILENT = "no answer yet"
TRACE = "Traceback:\n" + "\n\n".join(f"  frame {number}" for number in range(40)) + "\nValueError: the loss is not a number"


def test_what_the_user_can_mend_is_told_as_the_worker_found_it(home):
    found = ModelError("train.packing does not suit this model", "its layers mix rows", "train.packing=false")
    assert _failure(WorkerGroupError(TRACE, {1: found}), RUN) is found


def test_what_died_under_a_run_is_told_apart_from_what_the_run_did(home):
    """The first begins a job of the queue again, the second ends it."""
    died = WorkerGroupError("ray.exceptions.ActorDiedError: The actor died because its node has died.", {0: RuntimeError("x")})
    assert isinstance(_failure(died, RUN), ClusterError)
    assert not isinstance(_failure(WorkerGroupError(TRACE, {0: ValueError("x")}), RUN), ClusterError)


def test_other_failures_tell_the_workers_last_lines(home):
    failure = _failure(WorkerGroupError(TRACE, {0: ValueError("the loss is not a number")}), RUN)
    assert failure.why.endswith("ValueError: the loss is not a number")
    assert "frame 0" not in failure.why


def test_resuming_is_named_only_where_there_is_a_checkpoint(home):
    error = WorkerGroupError(TRACE, {})
    (home / "runs" / RUN).mkdir(parents=True)
    (home / "runs" / RUN / "checkpoint_manager_snapshot.json").write_text("{}")  # Ray writes it before there is a checkpoint
    assert "--resume" not in str(_failure(error, RUN))
    (home / "runs" / RUN / "checkpoint_2026").mkdir(parents=True)
    assert f"--resume {RUN}" in _failure(error, RUN).remedy


class Method:
    """A method of an actor, which here answers at once."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def remote(self, *arguments):
        self.calls.append(arguments)
        return self.answer


@pytest.fixture
def control(monkeypatch):
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray, "wait", lambda asked, timeout: ([] if asked == [SILENT] else asked, []))
    return SimpleNamespace(read=Method(None), ask_to_stop=Method(None))


def wait_for(what):
    for _ in range(500):
        if what():
            return
        time.sleep(0.02)
    raise AssertionError("waited too long")


def be_sent(number: int) -> None:
    os.kill(os.getpid(), number)
    wait_for(lambda: False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_the_first_progress_a_signal_ends_the_run_at_once(number, control):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), _watch(control, lambda progress: None):
        be_sent(number)
    assert signal.getsignal(number) is before


def test_a_signal_just_after_the_first_progress_is_a_wish(control):
    """What the run has learnt is saved, though nobody has looked since how far it is."""
    control.read.answer = "step 1"
    with _watch(control, lambda progress: None):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: control.ask_to_stop.calls)


def test_where_nobody_answers_a_signal_ends_the_run_at_once_unless_it_had_got_on(control):
    """On a core that many processes start on, the one that is asked may take a minute to be there; the card is wanted by then."""
    control.read.answer = SILENT
    with pytest.raises(KeyboardInterrupt), _watch(control, lambda progress: None):
        be_sent(signal.SIGTERM)
    shown = []
    control.read.answer = "step 1"
    with _watch(control, shown.append):
        wait_for(lambda: shown)
        control.read.answer = SILENT
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: control.ask_to_stop.calls)


def test_later_the_first_signal_is_a_wish_and_the_second_an_order(control):
    shown = []
    control.read.answer = "step 1"
    with _watch(control, shown.append) as stop_reason:
        wait_for(lambda: shown)
        assert stop_reason() is None
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: control.ask_to_stop.calls)
        assert stop_reason() == "the job was asked to stop"
        with pytest.raises(KeyboardInterrupt):
            be_sent(signal.SIGTERM)
    assert shown == ["step 1"]


def test_a_cluster_that_is_gone_ends_the_watch_without_noise(control, capfd):
    class Gone:
        def remote(self):
            raise ray.exceptions.RayActorError

    control.read = Gone()
    with _watch(control, lambda progress: None) as stop_reason:
        time.sleep(0.7)
    assert stop_reason() is None
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_that_waits_for_cards_hears_signals_all_the_time():
    """While Ray waits, Python answers none: a job that is to leave would be killed, and a card that chat wants be kept for that long."""
    from train.controller import HearingHandle

    waits: list[float] = []
    handle = HearingHandle(SimpleNamespace(wait=lambda seconds: waits.append(seconds) or len(waits) == 3))
    assert handle.wait(60)
    assert waits == [1, 1, 1]
    assert not HearingHandle(SimpleNamespace(wait=lambda seconds: False)).wait(0)


def test_sigterm_may_be_taken_for_ctrl_c():
    with pytest.raises(KeyboardInterrupt), on_signals(signal.default_int_handler):
        be_sent(signal.SIGTERM)


def test_a_worker_stands_by_for_one_who_works_where_it_is(monkeypatch):
    ended = []
    monkeypatch.setattr(ray, "kill", ended.append)
    standby = Standby("worker", "card0")
    assert standby.take(["card0"]) == "worker"
    assert standby.take(["card0"]) is None, "it is the worker of a run now, and ends with it"
    assert not ended
    elsewhere = Standby("worker", "card1")
    assert elsewhere.take(["card0"]) is None
    assert ended == ["worker"], "nobody else would end it before the run is over"
    assert elsewhere.take(["card1"]) is None


def test_on_a_gpu_a_worker_finds_nothing_and_else_its_share_of_the_cores(monkeypatch, tmp_path):
    monkeypatch.setattr("cluster.limits.GROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    two = TrainConfig(num_workers=2)
    assert worker_environment(two, [{"gpu-share": "1"}]) == {}
    expected = {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "passive", "TORCHDYNAMO_DISABLE": "1"}
    assert worker_environment(two, [{}, {}]) == worker_environment(two, []) == expected
    assert worker_environment(TrainConfig(quantization="nf4"), [{}])["TORCHDYNAMO_DISABLE"] == "0"
    assert worker_environment(two, [{"own-cores": "3"}, {"own-cores": "2"}])["OMP_NUM_THREADS"] == "2", "both go on together"


@pytest.mark.parametrize(
    ("cards", "num_workers", "becomes_of_it", "wanted"),
    [
        ("card0", 1, None, "card0's"),
        ("card1", 1, None, "a new one"),
        ("card0,card1", 2, None, "a new one"),
        ("card0", 1, OutOfMemoryError("Ray's memory monitor killed it"), "a new one"),
        ("card0", 1, GetTimeoutError("it still imports"), "a new one"),
    ],
)
def test_a_worker_that_stands_by_is_taken_where_it_can_be_and_no_run_fails_for_it(monkeypatch, cards, num_workers, becomes_of_it, wanted):
    from train import controller

    def get(metadata, timeout):
        if becomes_of_it:
            raise becomes_of_it
        return metadata

    monkeypatch.setenv(CARDS_VARIABLE, cards)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    monkeypatch.setattr(controller.WorkerGroup, "_create_workers", lambda *_, **__: ["a new one"])
    monkeypatch.setattr(controller.Workers, "_assign_worker_ranks", staticmethod(lambda workers: [found.metadata for found in workers]))
    group = controller.Workers.__new__(controller.Workers)
    group.standby = Standby(SimpleNamespace(get_metadata=Method("card0's")), "card0")
    assert group._create_workers(num_workers, None, {"CPU": 1}) == [wanted]
