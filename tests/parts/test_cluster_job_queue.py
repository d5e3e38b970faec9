"""The line of jobs under processes that are killed while they write."""

import signal
import subprocess
import sys
import time

import pytest

from cluster.job_queue import RUNNING, STANDING, NewJob, Queue
from configs.loader import ROOT

# Each takes jobs, gives cards back and submits others as fast as it can; what it has submitted it says first.
WRITER = """
from cluster.job_queue import *
line, number = Queue(), 0
while True:
    job = line.submit(NewJob("train", "helpdesk", "name: helpdesk"))
    print(job.id, flush=True)
    line.begin(job.id, (f"card{job.id % 3}",), "it is its turn", 1.0)
    for other in line.jobs(RUNNING):
        if other.id % 2:
            line.ask_to_leave(other.id, "chat wants it back", 2.0)
        line.end(other.id, WAITING if other.id % 2 else DONE, "", 3.0)
"""


@pytest.mark.usefixtures("home")
def test_kill_9_at_any_moment_of_two_writers_loses_nothing_and_gives_no_card_twice():
    submitted = []
    for pause_s in (0.0, 0.05, 0.1):
        writers = [subprocess.Popen([sys.executable, "-c", WRITER], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for writer in writers:
            submitted.append(int(writer.stdout.readline()))
        time.sleep(pause_s)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
        for writer in writers:
            submitted += [int(line) for line in writer.communicate()[0].splitlines() if line]
        with Queue() as line:
            numbers = {job.id for job in line.jobs()}
            held = [card for job in line.jobs(RUNNING) for card in job.cards]
            assert set(submitted) <= numbers, "what was submitted is there"
            assert len(held) == len(set(held))
            assert all(job.cards == () or job.state in STANDING for job in line.jobs())
            assert line.connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            after = line.submit(NewJob("train", "helpdesk", "name: helpdesk"))
            assert after.id not in numbers, "and it can be written to"
    assert len(submitted) > 6
