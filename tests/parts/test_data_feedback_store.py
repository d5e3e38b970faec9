"""The store on real SQLite: several writers, a full disk, a database that is held by someone else, an address that is wrong."""

import asyncio
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Engine, event

from configs.errors import ClusterError
from configs.loader import ROOT
from data import feedback_store
from data.feedback_store import MAX_WAITING_ROWS, FeedbackStore, Row, StoreError, check_store, open_database, read_feedback

NUM_WRITERS, NUM_ROWS = 4, 50
WRITER = """
import asyncio, sys
from data.feedback_store import FeedbackStore
url, name = sys.argv[1:]
async def write():
    store = FeedbackStore(url)
    for number in range({num_rows}):
        about = dict(completion_id=f"{{name}}-{{number}}", version="helpdesk:2", key_name=name, created_s=0.0)
        store.keep(lambda: dict(about, messages=[dict(role="user", content="Hi")], answer="Hello.", finish_reason="stop"))
        await store.save(dict(about, rating="up", comment=None, better_answer=None))
    store.close()
    assert not store.num_dropped
asyncio.run(write())
"""


@pytest.fixture
def url(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/feedback.db"


def about(number: int) -> Row:
    return {"completion_id": f"chatcmpl-{number}", "version": "helpdesk:2", "key_name": "alice", "created_s": time.time()}


def opinion(number: int, comment: str = "") -> Row:
    return {**about(number), "rating": "up", "comment": comment, "better_answer": None}


def conversation(number: int, text: str = "Hi") -> Row:
    return {**about(number), "messages": [{"role": "user", "content": text}], "answer": "Hello.", "finish_reason": "stop"}


def count(url: str, table: str) -> int:
    with sqlalchemy.create_engine(url).connect() as connection:
        return int(connection.execute(sqlalchemy.text(f"SELECT count(*) FROM {table}")).scalar_one())


def test_several_processes_write_to_one_file_at_once(url):
    def write(number: int) -> None:
        command = [sys.executable, "-c", WRITER.format(num_rows=NUM_ROWS), url, f"writer{number}"]
        subprocess.run(command, cwd=ROOT, check=True, timeout=120)

    open_database(url).dispose()
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        list(pool.map(write, range(NUM_WRITERS)))
    rows = read_feedback(url)
    assert len(rows) == NUM_WRITERS * NUM_ROWS
    assert {row["answer"] for row in rows} == {"Hello."}


def test_a_full_disk_loses_conversations_and_says_so_to_feedback_alone(url, caplog):
    """SQLite's own bound on a file's pages stands for the disk; what it then says is the same."""

    def bound(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA max_page_count=40").close()

    async def fill() -> None:
        for number in range(20):
            store.keep(lambda number=number: conversation(number, "secret words " * 2000))
        with pytest.raises(StoreError, match="database or disk is full"):
            await store.save(opinion(99, "secret comment " * 10_000))
        assert 0 < count(url, "conversations") < 20
        event.remove(Engine, "connect", bound)
        store._database.dispose()  # as a connection that is opened when there is room again
        await store.save(opinion(99))

    event.listen(Engine, "connect", bound)
    store = FeedbackStore(url)
    asyncio.run(fill())
    store.close()
    assert store.num_dropped == 20 - count(url, "conversations") > 0
    assert len(caplog.records) == 1
    assert "secret" not in caplog.text
    assert len(read_feedback(url)) == 1


def test_while_another_holds_the_database_nothing_waits_and_the_queue_is_bounded(url, monkeypatch):
    monkeypatch.setattr(feedback_store, "WRITE_TIMEOUT_S", 0.2)
    store = FeedbackStore(url)
    asyncio.run(store.save(opinion(0)))
    other = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT").connect()
    other.execute(sqlalchemy.text("BEGIN EXCLUSIVE"))
    with pytest.raises(StoreError, match="TimeoutError"):
        asyncio.run(store.save(opinion(1)))
    for number in range(MAX_WAITING_ROWS + 10):
        store.keep(lambda number=number: conversation(number))
    assert store.num_dropped >= 10
    with pytest.raises(StoreError, match="rows wait already"):
        asyncio.run(store.save(opinion(2)))
    other.execute(sqlalchemy.text("COMMIT"))
    other.close()
    store.close()
    assert count(url, "conversations") == MAX_WAITING_ROWS + 10 - store.num_dropped >= MAX_WAITING_ROWS - 1
    with pytest.raises(StoreError, match="closed"):
        asyncio.run(store.save(opinion(3)))


def test_the_bytes_that_wait_are_bounded_and_leave_when_written(url):
    store = FeedbackStore(url)
    store.keep(lambda: conversation(0), feedback_store.MAX_WAITING_BYTES + 1)
    assert store.num_dropped == 1
    store.keep(lambda: conversation(1), feedback_store.MAX_WAITING_BYTES)
    asyncio.run(store.save(opinion(1)))
    store.keep(lambda: conversation(2), feedback_store.MAX_WAITING_BYTES)
    store.close()
    assert (count(url, "conversations"), store.num_dropped) == (2, 1)


def test_others_read_while_one_writes(url):
    store = FeedbackStore(url)
    asyncio.run(store.save(opinion(0)))
    with sqlalchemy.create_engine(url).connect() as reader:
        assert reader.execute(sqlalchemy.text("PRAGMA journal_mode")).scalar_one() == "wal"
        assert reader.execute(sqlalchemy.text("SELECT count(*) FROM feedback")).scalar_one() == 1
        asyncio.run(store.save(opinion(1)))
    store.close()
    assert count(url, "feedback") == 2


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("no address", "FEEDBACK_URL is no database's address"),
        ("oracledb9://scott:tiger@host/db", "NoSuchModuleError"),
        ("sqlite:////nowhere/feedback.db", "unable to open database file"),
    ],
)
def test_a_database_that_cannot_be_opened_is_refused_without_its_password(url, said, home, monkeypatch):
    monkeypatch.setenv("FEEDBACK_URL", url)
    with pytest.raises(ClusterError, match=said) as refusal:
        check_store()
    assert "tiger" not in str(refusal.value)
    assert "FEEDBACK_URL" in refusal.value.remedy


def test_a_database_that_can_be_opened_is_not_refused(home, tmp_path, monkeypatch):
    check_store()
    assert (home / "feedback.db").stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("FEEDBACK_URL", f"sqlite:///{tmp_path}/other.db")
    check_store()
    assert count(f"sqlite:///{tmp_path}/other.db", "feedback") == 0
