"""`python -m cluster.arbitrate`: the arbiter's process, which `up` starts and `down` ends. There is nothing in it for users.

Knows when to look. Whatever fails is told in the log, and looked at again.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from cluster.arbiter import Arbiter
from cluster.exporter import Exporter, serve_metrics
from cluster.home import home_folder
from cluster.job_queue import STANDING, Queue
from cluster.kuberay import arbiter_port
from cluster.logs import set_up
from cluster.parts import ray_folder
from cluster.ray_ground import RayGround
from cluster.sampler import sampler_of
from cluster.session import wait_for_session
from configs.errors import TandemError
from configs.schema import MachineConfig

LOOK_EVERY_S = 1.0
LOOK_IDLY_S = 10.0  # with no job in line there is little to do, and the dashboard is left alone

log = logging.getLogger("tandem.arbiter")


def main() -> None:
    """Look, and do what is to be done, until ended."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    set_up()
    with _alone(), Queue() as queue:
        session = wait_for_session()
        machine = MachineConfig.model_validate(session.machine)
        arbiter, exporter = Arbiter(queue, RayGround(session), machine.lending), Exporter(queue)
        sampler = sampler_of(session)
        serve_metrics(exporter, machine.listen_host, arbiter_port(), ray_folder())
        log.info("the arbiter is at work")
        looked_s, trouble = 0.0, ""
        while True:
            time.sleep(LOOK_EVERY_S)
            try:
                sampler.sample()
                if time.monotonic() - looked_s < LOOK_IDLY_S and not queue.jobs(*STANDING):
                    continue
                looked_s = time.monotonic()
                arbiter.step(time.time(), exporter.note)
                now_trouble = ""
            except (TandemError, httpx.HTTPError, KeyError, OSError, ValueError) as error:
                exporter.miss(time.time())
                now_trouble = f"{type(error).__name__}: {error}"
            if now_trouble != trouble:
                log.warning("%s", now_trouble or "all answers again")
                trouble = now_trouble


@contextmanager
def _alone() -> Iterator[None]:
    """Let one arbiter act at a time; another waits for its end."""
    import fcntl

    with (home_folder() / "arbiter.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main()
