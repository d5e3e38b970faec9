"""The log: one JSON event a line, whole however many write, and without what is nobody's business."""

import io
import json
import logging
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.home import log_folder, write_text
from cluster.log_view import showing_streams
from cluster.logs import API, INFERENCE, REDACTED, STREAMS, SYSTEM, TRAINING, Streams, paint, set_up, stream_file, streams
from cluster.session import LOGS_VARIABLE, token_file
from cluster.shared_file import SharedFile, aside
from configs.schema import LogConfig

KEY = "sk-tandem-Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6cXV4"
TOKEN = "c0ffee" * 10
HUB_TOKEN = "of no shape at all: ü"
DATABASE = "postgresql://tandem:hunter22@db/feedback"
JUDGE = "judge-secret"


@pytest.fixture
def planted(home, monkeypatch) -> None:
    """Secrets of every kind, where Tandem looks for its own."""
    for name, secret in (("HUGGINGFACE_TOKEN", HUB_TOKEN), ("FEEDBACK_URL", DATABASE), ("JUDGE_API_KEY", JUDGE)):
        monkeypatch.setenv(name, secret)
    write_text(token_file(), TOKEN)


@pytest.fixture
def restored(home) -> Iterator[None]:
    """Take away afterwards what `set_up` did."""
    logger = logging.getLogger("tandem")
    before = logger.handlers[:], logger.level
    yield
    logger.handlers, logger.level = before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(stream: str, num_aside: int = 0) -> list[dict]:
    file = stream_file(log_folder(), stream)
    file = aside(file, num_aside) if num_aside else file
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_each_event_is_one_line_that_says_when_what_and_in_which_stream(home):
    for stream in STREAMS:
        streams().logger(stream).info("seen", text_of="two\nlines \x1b[2J \u2028 \ud800", loss=float("nan"), share=0.5, none=None)
    for stream in STREAMS:
        (line,) = lines(stream)
        assert list(line)[:4] == ["timestamp", "level", "stream", "event"]
        assert line["timestamp"].endswith("Z")
        assert (line["level"], line["stream"], line["event"], line["loss"], line["share"]) == ("info", stream, "seen", "nan", 0.5)
        assert stream_file(log_folder(), stream).read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("secret", [KEY, TOKEN, HUB_TOKEN, DATABASE, JUDGE, "hf_abcdefghijklmnop", "ghp_abcdefghijklmnop"])
def test_a_secret_is_taken_out_wherever_it_stands(secret, planted):
    logger = streams().logger(SYSTEM).bind(bound=f"x {secret}")
    logger.info(f"said {secret}", value=secret, inside={"deep": [f"({secret})", {secret: 1}]}, thing=ValueError(secret))
    try:
        raise RuntimeError(secret)
    except RuntimeError:
        logger.exception("failed")
    said = stream_file(log_folder(), SYSTEM).read_text()
    assert said.count(REDACTED) >= 7
    assert secret not in said
    assert json.dumps(secret)[1:-1] not in said


def test_an_address_with_a_password_and_no_name_tells_neither_and_a_text_of_colons_takes_no_hours(home):
    streams().logger(SYSTEM).info("seen", url="redis://:hunter22@cache/0", said="://" + "a:" * 200_000)
    (line,) = lines(SYSTEM)
    assert line["url"] == f"redis://{REDACTED}@cache/0"
    assert line["said"] == "://" + "a:" * 200_000


def test_the_rest_of_a_line_stays(planted):
    streams().logger(SYSTEM).info(f"Authorization: Bearer {KEY}, at http://me:{JUDGE}@host/v1 for alice", key_name="alice", num_tokens=3)
    (line,) = lines(SYSTEM)
    assert line["event"] == f"Authorization: Bearer {REDACTED}, at http://{REDACTED}@host/v1 for alice"
    assert (line["key_name"], line["num_tokens"]) == ("alice", 3)


@pytest.mark.parametrize("name", ["authorization", "api_key", "X-API-Key", "password", "token", "hub_token", "client_secret", "Cookie"])
def test_a_field_that_is_named_as_a_secret_is_one(name, home):
    streams().logger(API).info("seen", **{name: "1234", "headers": {name: ["1234"]}})
    assert "1234" not in stream_file(log_folder(), API).read_text()


PROMPT = [{"role": "user", "content": f"My secret is {KEY}, and I am Martha."}]


def test_prompts_are_logged_only_where_the_operator_wants_it_and_keys_never(home, monkeypatch):
    for wanted in (False, True):
        chosen = Streams(log_folder() / str(wanted), LogConfig(prompts=wanted))
        (log_folder() / str(wanted)).mkdir()
        chosen.logger(INFERENCE).info("answer", prompt=PROMPT, messages=PROMPT, inside={"content": "Martha"})
        said = stream_file(log_folder() / str(wanted), INFERENCE).read_text()
        assert ("Martha" in said) is wanted
        assert KEY not in said


def test_an_error_tells_its_message_only_where_that_cannot_be_what_somebody_wrote(home):
    written = "Martha wrote"
    for stream in (API, INFERENCE, TRAINING):
        try:
            try:
                raise KeyError(written)
            except KeyError as error:
                raise RuntimeError(written) from error
        except RuntimeError:
            streams().logger(stream).exception("failed")
        (line,) = lines(stream)
        assert "test_cluster_logs.py" in line["exception"]
        assert line["exception"].index("KeyError") < line["exception"].index("RuntimeError")
        assert (written in line["exception"]) is (stream == TRAINING)


def test_what_is_logged_by_logging_goes_to_its_stream_too(restored, monkeypatch):
    monkeypatch.setattr(sys, "__stdout__", output := io.StringIO())
    set_up()
    logging.getLogger("tandem.api").error("100%% of %s", "it", extra={"fields": {"request_id": "r1"}})
    logging.getLogger("tandem.arbiter").warning("100%")
    logging.getLogger("tandem.arbiter").debug("not at this level")
    assert [(line["event"], line["level"], line["request_id"]) for line in lines(API)] == [("100% of it", "error", "r1")]
    assert [(line["event"], line["source"]) for line in lines(SYSTEM)] == [("100%", "arbiter")]
    shown = [json.loads(line) for line in output.getvalue().splitlines()]
    assert shown == lines(API) + lines(SYSTEM), "standard output has the same"


def test_an_output_that_is_a_file_gets_no_second_copy(restored, monkeypatch, tmp_path):
    with (tmp_path / "worker.out").open("w") as output:
        monkeypatch.setattr(sys, "__stdout__", output)
        set_up()
        logging.getLogger("tandem.api").error("seen")
    assert len(lines(API)) == 1
    assert (tmp_path / "worker.out").read_text() == ""


def test_a_terminal_gets_colours_and_no_commands_of_others(home):
    streams().echo = terminal = Terminal()
    streams().logger(API).info("request", route="/v1/models", agent="\x1b[2Jboo")
    assert "\x1b[1mrequest" in terminal.getvalue()
    assert "\\x1b[2Jboo" in terminal.getvalue()
    assert "\x1b[2J" not in terminal.getvalue()


def test_the_settings_of_up_reach_every_process(home, monkeypatch):
    monkeypatch.setenv(LOGS_VARIABLE, '{"level": "error"}')
    streams().logger(API).warning("left out")
    streams().logger(API).error("written")
    assert [line["event"] for line in lines(API)] == ["written"]


NUM_WRITERS, NUM_LINES = 4, 400


def write_many(file: Path, writer: int) -> None:
    shared = SharedFile(file, max_bytes=100_000, num_kept=100)
    for number in range(NUM_LINES):
        filler = "x" * (number * 37 % 9000)  # some over what a pipe or a buffered stream writes at once
        shared.write(json.dumps({"writer": writer, "number": number, "filler": filler}).encode() + b"\n")


def test_several_processes_write_at_once_and_no_line_is_torn_lost_or_doubled_as_files_are_put_aside(tmp_path):
    file, context = tmp_path / "training.jsonl", multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(file, number)) for number in range(NUM_WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    files = sorted(tmp_path.glob("training.jsonl*"))
    found = [json.loads(line) for part in files for line in part.read_bytes().splitlines()]
    assert sorted((line["writer"], line["number"]) for line in found) == [(w, n) for w in range(NUM_WRITERS) for n in range(NUM_LINES)]
    assert len(files) > 40
    assert max(part.stat().st_size for part in files) < 100_000 + NUM_WRITERS * 10_000


def test_the_oldest_of_those_put_aside_is_deleted(tmp_path):
    shared = SharedFile(tmp_path / "api.jsonl", max_bytes=10, num_kept=2)
    for number in range(5):
        shared.write(b"line %d\n" % number)
    assert {file.name: file.read_text() for file in tmp_path.glob("api*")} == {
        "api.jsonl": "line 4\n",
        "api.jsonl.1": "line 3\n",
        "api.jsonl.2": "line 2\n",
    }


def test_a_file_that_is_deleted_comes_back_and_a_full_disk_fails_nobody(tmp_path):
    shared = SharedFile(tmp_path / "api.jsonl", max_bytes=1000, num_kept=1)
    shared.write(b"one\n")
    shared.file.unlink()
    shared.write(b"two\n")
    assert shared.file.read_bytes() == b"two\n"
    SharedFile(tmp_path / "nowhere" / "api.jsonl", 1000, 1).write(b"lost\n")
    SharedFile(Path("/dev/full"), 1000, 1).write(b"lost\n")


def test_a_file_that_could_not_be_opened_for_a_while_is_written_to_again(tmp_path):
    shared = SharedFile(tmp_path / "api.jsonl", max_bytes=1000, num_kept=1)
    shared.write(b"one\n")
    hidden = shared.file.rename(tmp_path / "hidden")
    shared.file.mkdir()
    shared.write(b"lost\n")
    shared.file.rmdir()
    hidden.rename(shared.file)
    shared.write(b"two\n")
    assert shared.file.read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize("line", ['{"timestamp": "2026-01-01T00:00:00Z", "level": "in', "[1]\n", "\0\0\x1b[2J", ""])
def test_a_torn_line_is_shown_as_it_is(line):
    assert "\x1b[2J" not in paint(line)


def test_a_log_is_read_by_its_owner_and_group_alone(home):
    streams().logger(API).info("seen")
    assert stream_file(log_folder(), API).stat().st_mode & 0o007 == 0


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_foreground_shows_what_comes_into_the_streams_meanwhile_and_none_of_it_twice(is_terminal, home, monkeypatch):
    monkeypatch.setattr(sys, "stdout", output := Terminal() if is_terminal else io.StringIO())
    streams().logger(API).info("before")
    with showing_streams():
        streams().logger(API).info("first", password="1234")
        stream_file(log_folder(), API).rename(aside(stream_file(log_folder(), API), 1))
        streams().logger(API).info("second")
        streams().logger(SYSTEM).info("third")
    streams().logger(API).info("after")
    written = [line for line in (*lines(API, num_aside=1), *lines(API), *lines(SYSTEM)) if line["event"] not in ("before", "after")]
    if is_terminal:
        assert output.getvalue().splitlines() == [paint(json.dumps(line)) for line in written]
    else:
        assert [json.loads(line) for line in output.getvalue().splitlines()] == written
    assert [line["event"] for line in written] == ["first", "second", "third"]


def test_where_nothing_was_logged_yet_that_is_said(command, home):
    told = command("cluster", "logs", "api")
    assert (told.status, told.out, told.err) == (0, "", f"nothing was logged yet: {home / 'logs'}\n")


def test_the_newest_lines_are_shown_in_the_order_of_time_and_searched(command):
    for number in range(6):
        streams().logger(STREAMS[number % 2]).info("seen", number=number)
    stream_file(log_folder(), TRAINING).rename(aside(stream_file(log_folder(), TRAINING), 1))
    streams().logger(TRAINING).info("seen", number=6)

    def numbers(*words: str) -> list[int]:
        return [json.loads(line)["number"] for line in command("cluster", "logs", *words).out.splitlines()]

    assert numbers("--last", "4") == [3, 4, 5, 6]
    assert numbers("training") == [0, 2, 4, 6]
    assert numbers("--find", '"number": 5') == [5]
    assert numbers("--last", "0") == []
    assert "no line has 'nobody' in it" in command("cluster", "logs", "--find", "nobody").err
    refused = command("cluster", "logs", "trainin")
    assert (refused.status, "training, inference, system, api" in refused.err) == (2, True)
