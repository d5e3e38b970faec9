"""The store on real SQLite and PostgreSQL: several writers, a full disk, a database that others hold or end, an address that is wrong."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Engine, event

from cluster.processes import free_port
from configs.errors import ClusterError
from configs.loader import ROOT
from data import feedback_store
from data.feedback_store import (
    MAX_WAITING_ROWS,
    TABLES,
    FeedbackStore,
    Row,
    StoreError,
    all_feedback,
    check_store,
    delete_rows,
    feedback_url,
    open_database,
    read_feedback,
    read_ratings,
    stored_rows,
)
from tests.helpers.postgres import find_postgres, own_postgres

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


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    programs = find_postgres()
    if programs is None:
        pytest.skip("there is no PostgreSQL server on this machine, or nobody whom it would run as")
    with own_postgres(programs) as address:
        yield address


@pytest.fixture
def postgres(server) -> str:
    """The address of an empty PostgreSQL database."""
    with sqlalchemy.create_engine(server).begin() as connection:
        TABLES.drop_all(connection)
    return server


@pytest.fixture(params=["sqlite", "postgres"])
def any_url(request) -> str:
    return request.getfixturevalue({"sqlite": "url"}.get(request.param, request.param))


def about(number: int) -> Row:
    return {"completion_id": f"chatcmpl-{number}", "version": "helpdesk:2", "key_name": "alice", "created_s": time.time()}


def opinion(number: int, comment: str = "") -> Row:
    return {**about(number), "rating": "up", "comment": comment, "better_answer": None}


def conversation(number: int, text: str = "Hi") -> Row:
    return {**about(number), "messages": [{"role": "user", "content": text}], "answer": "Hello.", "finish_reason": "stop"}


def count(url: str, table: str) -> int:
    with sqlalchemy.create_engine(url).connect() as connection:
        return int(connection.execute(sqlalchemy.text(f"SELECT count(*) FROM {table}")).scalar_one())


def test_several_processes_write_to_one_database_at_once(any_url):
    def write(number: int) -> None:
        command = [sys.executable, "-c", WRITER.format(num_rows=NUM_ROWS), any_url, f"writer{number}"]
        subprocess.run(command, cwd=ROOT, check=True, timeout=120)

    open_database(any_url).dispose()
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        list(pool.map(write, range(NUM_WRITERS)))
    rows = read_feedback(any_url)
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


def test_the_bytes_that_wait_are_bounded_and_leave_when_written(any_url):
    store = FeedbackStore(any_url)
    store.keep(lambda: conversation(0), feedback_store.MAX_WAITING_BYTES + 1)
    assert store.num_dropped == 1
    store.keep(lambda: conversation(1), feedback_store.MAX_WAITING_BYTES)
    asyncio.run(store.save(opinion(1)))
    store.keep(lambda: conversation(2), feedback_store.MAX_WAITING_BYTES)
    store.close()
    assert (count(any_url, "conversations"), store.num_dropped) == (2, 1)


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


def test_what_is_written_is_read_changed_and_deleted(any_url, home, monkeypatch):
    monkeypatch.setenv("FEEDBACK_URL", any_url)
    check_store()
    kept = {**conversation(1, "Wie geht's? 😀 \x00"), "answer": "Gut. 😀", "finish_reason": None}

    async def write() -> None:
        store.keep(lambda: kept)
        for comment in ("Good.", "Très bien. 😀"):
            await store.save(opinion(1, comment))
        await store.save({**opinion(2), "rating": "down", "key_name": None})

    store = FeedbackStore(feedback_url())
    asyncio.run(write())
    store.close()
    assert store.num_dropped == 0
    first, second = all_feedback()
    assert (first["comment"], first["messages"], first["answer"]) == ("Très bien. 😀", kept["messages"], kept["answer"])
    assert (second["rating"], second["key_name"], second["messages"]) == ("down", None, None)
    assert sorted(read_ratings("helpdesk:2", time.time() - 60)) == ["down", "up"]
    assert read_ratings("helpdesk:2", time.time() + 60) == read_ratings("helpdesk:1", 0) == []
    assert len(stored_rows()) == 3
    delete_rows({first["completion_id"], "chatcmpl-unknown"})
    assert [row["completion_id"] for row in stored_rows()] == [second["completion_id"]]


def test_while_others_hold_postgres_nothing_waits_and_what_cannot_be_stored_is_named_without_its_words(postgres, monkeypatch, caplog):
    monkeypatch.setattr(feedback_store, "WRITE_TIMEOUT_S", 0.2)
    store = FeedbackStore(postgres)
    open_database(postgres).dispose()
    with sqlalchemy.create_engine(postgres).begin() as other:
        other.execute(sqlalchemy.text("LOCK TABLE feedback, conversations IN ACCESS EXCLUSIVE MODE"))
        store.keep(lambda: conversation(0))
        with pytest.raises(StoreError, match="TimeoutError"):
            asyncio.run(store.save(opinion(1)))
    store.keep(lambda: {**conversation(1), "answer": "secret words \x00"})
    store.close()
    assert (count(postgres, "conversations"), count(postgres, "feedback"), store.num_dropped) == (1, 0, 1)
    assert "conversations are not kept" in caplog.text
    assert "secret" not in caplog.text


def test_connections_that_postgres_ended_meanwhile_lose_nothing(postgres):
    """As a restart of the server does."""
    store = FeedbackStore(postgres)

    async def story() -> None:
        await store.save(opinion(0))
        with sqlalchemy.create_engine(postgres, isolation_level="AUTOCOMMIT").connect() as other:
            others = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
            ended = other.execute(sqlalchemy.text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"))
            assert any(ended.scalars())
        await store.save(opinion(1))

    asyncio.run(story())
    store.close()
    assert count(postgres, "feedback") == 2


def test_a_postgres_that_does_not_answer_is_refused_without_its_password(home, monkeypatch):
    monkeypatch.setenv("FEEDBACK_URL", f"postgresql+psycopg://scott:tiger@127.0.0.1:{free_port()}/feedback")
    with pytest.raises(ClusterError, match="OperationalError: connection failed") as refusal:
        check_store()
    assert "tiger" not in str(refusal.value)
