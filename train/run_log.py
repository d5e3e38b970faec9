"""A run in the log's stream `training`: its steps, and how it began and ended.

Knows which fields tell one run from another. Does not know what a step is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cluster.logs import TRAINING, Logger, streams
from configs.errors import TandemError

if TYPE_CHECKING:
    from train.worker import Task


def run_logger(task: "Task") -> Logger:
    """Return a logger whose lines say which run they are of."""
    return streams().logger(TRAINING).bind(run=task.run_id, chatbot=task.config.name)


@contextmanager
def told(run_id: str, chatbot: str, kind: str) -> Iterator[None]:
    """Log that a run or a sweep is begun or gone on with, and how it ended."""
    log = streams().logger(TRAINING).bind(run=run_id, chatbot=chatbot, kind=kind)
    log.info("begun")
    try:
        yield
    except KeyboardInterrupt:
        log.warning("stopped")
        raise
    except TandemError as error:
        log.error("failed", what=error.what, why=error.why, remedy=error.remedy)
        raise
    except Exception:
        log.exception("failed")
        raise
    log.info("ended")
