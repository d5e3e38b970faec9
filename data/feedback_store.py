"""Where feedback and kept conversations lie: a database that one thread writes to, so that no answer waits for it.

Knows SQLAlchemy. Does not know HTTP, or how an answer came to be.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from sqlalchemy import JSON, URL, Column, Double, Engine, MetaData, String, Table, UnicodeText, create_engine, event, make_url, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from cluster.home import OWNER_ONLY, home_folder
from configs.errors import ClusterError
from configs.schema import Environment

MAX_WAITING_ROWS = 256
MAX_WAITING_BYTES = 64 * 2**20
WRITE_TIMEOUT_S = 5.0
BUSY_TIMEOUT_MS = 5000  # how long SQLite waits for another replica's write
LOG_EVERY_S = 60.0
MAX_ID_LETTERS = 700
Row = dict[str, Any]
FAILURES = (SQLAlchemyError, ImportError, OSError, TimeoutError)

log = logging.getLogger("tandem.api")


def _columns() -> list[Column[Any]]:
    """Return what every row says: which answer it is about, who spoke, who was answered."""
    return [
        Column("completion_id", String(MAX_ID_LETTERS), primary_key=True),
        Column("version", UnicodeText, nullable=False),
        Column("key_name", UnicodeText),
        Column("created_s", Double, nullable=False),
    ]


TABLES = MetaData()
OPINION = (Column("rating", String(4), nullable=False), Column("comment", UnicodeText), Column("better_answer", UnicodeText))
CHAT = (Column("messages", JSON, nullable=False), Column("answer", UnicodeText, nullable=False), Column("finish_reason", UnicodeText))
FEEDBACK = Table("feedback", TABLES, *_columns(), *OPINION)
CONVERSATIONS = Table("conversations", TABLES, *_columns(), *CHAT)


class StoreError(Exception):
    """A row could not be stored; the message holds nothing of the row."""


class FeedbackStore:
    """Writes rows, each whole or not at all; a row with the id of an earlier one takes its place."""

    def __init__(self, url: URL | str) -> None:
        self.url = url
        self.num_dropped = 0
        self._waiting_bytes = 0
        self._database: Engine | None = None
        self._writer = ThreadPoolExecutor(1, "feedback")
        self._places = threading.BoundedSemaphore(MAX_WAITING_ROWS)
        self._lock = threading.Lock()
        self._logged_s = -LOG_EVERY_S

    async def save(self, row: Row) -> None:
        """Store what somebody said of an answer, and wait until it is written.

        Raises:
            StoreError: It is not, or not in time.
        """
        try:
            written = self._submit(lambda: self._put(FEEDBACK, row))
            await asyncio.wait_for(asyncio.wrap_future(written), WRITE_TIMEOUT_S)
        except FAILURES as error:
            raise StoreError(_reason(error)) from None

    def keep(self, make_row: Callable[[], Row | None], num_bytes: int = 0) -> None:
        """Store a conversation some time; never waits and never fails: one that cannot be stored is counted and left out."""
        with self._lock:
            is_full = self._waiting_bytes + num_bytes > MAX_WAITING_BYTES
            self._waiting_bytes += 0 if is_full else num_bytes
        if is_full:
            self._drop(f"{MAX_WAITING_BYTES} bytes wait already")
            return

        def write() -> None:
            if row := make_row():
                self._put(CONVERSATIONS, row)

        try:
            written = self._submit(write)
            written.add_done_callback(lambda _: self._leave(num_bytes))
            written.add_done_callback(self._note)
        except StoreError as error:
            self._leave(num_bytes)
            self._drop(str(error))

    def close(self) -> None:
        """Write what still waits."""
        self._writer.shutdown()
        if self._database:
            self._database.dispose()

    def _submit(self, write: Callable[[], None]) -> Future[None]:
        if not self._places.acquire(blocking=False):
            raise StoreError(f"{MAX_WAITING_ROWS} rows wait already")
        try:
            written = self._writer.submit(write)
        except RuntimeError:
            self._places.release()
            raise StoreError("the store is closed") from None
        written.add_done_callback(lambda _: self._places.release())
        return written

    def _put(self, table: Table, row: Row) -> None:
        self._database = self._database or open_database(self.url)
        with self._database.begin() as connection:
            connection.execute(table.delete().where(table.c.completion_id == row["completion_id"]))
            connection.execute(table.insert(), row)

    def _leave(self, num_bytes: int) -> None:
        with self._lock:
            self._waiting_bytes -= num_bytes

    def _note(self, written: Future[None]) -> None:
        if not written.cancelled() and (error := written.exception()):
            self._drop(_reason(error))

    def _drop(self, reason: str) -> None:
        with self._lock:
            self.num_dropped += 1
            if time.monotonic() - self._logged_s < LOG_EVERY_S:
                return
            self._logged_s = time.monotonic()
        log.warning("conversations are not kept, %d so far: %s", self.num_dropped, reason)


def feedback_url() -> URL:
    """Return where feedback is stored: FEEDBACK_URL, or a file in the home folder.

    Raises:
        ClusterError: It is no URL.
    """
    secret = Environment().feedback_url
    if secret is None:
        file = home_folder() / "feedback.db"
        if not file.exists():
            file.touch(mode=OWNER_ONLY)  # SQLite would let everybody read it
        return URL.create("sqlite", database=str(file))
    try:
        return make_url(secret.get_secret_value())
    except SQLAlchemyError:
        raise ClusterError("FEEDBACK_URL is no database's address", "", "FEEDBACK_URL=sqlite:////path/to/feedback.db") from None


def open_database(url: URL | str) -> Engine:
    """Return a database that has the tables; `check_store` makes them before there are replicas to make them at once."""
    database = create_engine(url, pool_pre_ping=True, hide_parameters=True)
    if database.dialect.name == "sqlite":
        event.listen(database, "connect", _share)
    TABLES.create_all(database)
    return database


def check_store() -> None:
    """Refuse a database that cannot be opened, before anything is served.

    Raises:
        ClusterError: Its address or its driver is wrong, or it does not answer.
    """
    url = feedback_url()
    with _named(url, "stored in"):
        open_database(url).dispose()


def all_feedback() -> list[Row]:
    """Return all feedback of this home folder, as `read_feedback` does.

    Raises:
        ClusterError: The database cannot be opened or read.
    """
    url = feedback_url()
    with _named(url, "read from"):
        return read_feedback(url)


def read_ratings(version: str, since_s: float) -> list[str]:
    """Return the thumbs that people gave to a version's answers since a time of day.

    Raises:
        ClusterError: The database cannot be opened or read.
    """
    url = feedback_url()
    wanted = select(FEEDBACK.c.rating).where(FEEDBACK.c.version == version, FEEDBACK.c.created_s >= since_s)
    with _named(url, "read from"), _opened(url) as database, database.connect() as connection:
        return list(connection.execute(wanted).scalars())


def read_feedback(url: URL | str) -> list[Row]:
    """Return all feedback, the oldest first, each with its conversation where that was kept (else its columns are None)."""
    joined = FEEDBACK.outerjoin(CONVERSATIONS, FEEDBACK.c.completion_id == CONVERSATIONS.c.completion_id)
    wanted = select(*FEEDBACK.c, *CHAT).select_from(joined).order_by(FEEDBACK.c.created_s)
    with _opened(url) as database, database.connect() as connection:
        return [dict(row) for row in connection.execute(wanted).mappings()]


def stored_rows() -> list[Row]:
    """Return every opinion and every kept conversation, each as a row of its own.

    Raises:
        ClusterError: The database cannot be opened or read.
    """
    url = feedback_url()
    with _named(url, "read from"), _opened(url) as database, database.connect() as connection:
        return [dict(row) for table in (FEEDBACK, CONVERSATIONS) for row in connection.execute(select(table)).mappings()]


def delete_rows(completion_ids: set[str]) -> None:
    """Delete what is stored of these answers, all or nothing; SQLite overwrites it with zeros.

    Raises:
        ClusterError: The database cannot be opened or written.
    """
    url = feedback_url()
    with _named(url, "deleted from"), _opened(url) as database:
        with database.begin() as connection:
            if database.dialect.name == "sqlite":
                connection.exec_driver_sql("PRAGMA secure_delete=ON")
            for table in (FEEDBACK, CONVERSATIONS):
                for completion_id in completion_ids:
                    connection.execute(table.delete().where(table.c.completion_id == completion_id))
        if database.dialect.name == "sqlite":
            with database.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")


@contextmanager
def _opened(url: URL | str) -> Iterator[Engine]:
    database = open_database(url)
    try:
        yield database
    finally:
        database.dispose()


@contextmanager
def _named(url: URL, done: str) -> Iterator[None]:
    """Turn what a database fails with into an error that names it, without its password."""
    try:
        yield
    except FAILURES as error:
        shown = url.render_as_string(hide_password=True)
        remedy = "mend FEEDBACK_URL in .env; the database must answer, and its driver be installed"
        raise ClusterError(f"feedback cannot be {done} {shown}", _reason(error), remedy) from None


def _share(connection: Any, _: Any) -> None:
    """Let several replicas write to one file, and others read it meanwhile."""
    for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "journal_mode=WAL", "synchronous=NORMAL"):
        connection.execute(f"PRAGMA {pragma}").close()


def _reason(error: BaseException) -> str:
    """Say what went wrong without a word of what was to be written."""
    if isinstance(error, DBAPIError) and error.orig:
        return f"{type(error).__name__}: {str(error.orig).partition(chr(10))[0][:200]}"
    return f"{type(error).__name__}: {error}"[:200] if isinstance(error, ImportError | OSError) else type(error).__name__
